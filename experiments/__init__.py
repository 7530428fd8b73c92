"""Training and the tasks around it: the only package that uses hydra and wandb, and one that nothing else imports."""
