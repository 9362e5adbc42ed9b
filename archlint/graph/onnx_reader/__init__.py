"""Reading ONNX files: bytes safely, tensors lazily, shapes statically, operators into the graph."""
