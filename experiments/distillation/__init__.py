"""Distillation of LAM from a BERT-like encoder: the teacher, texts, cached outputs, loss, training."""
