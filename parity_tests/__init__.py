"""The proofs that the implementations are the same, and the harness that finds where they are not."""
