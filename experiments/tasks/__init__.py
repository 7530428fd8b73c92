"""Tasks on a trained model."""
