"""Pure functions on arrays, twins of torch_impl.ops: arrays and scalars in, arrays out."""
