"""Pure functions on tensors: arrays and scalars in, arrays out. The recurrent forms are the readable truth."""
