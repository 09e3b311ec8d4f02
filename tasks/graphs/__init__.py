"""ONNX graphs: what is read, cut and rewritten in them. Never imports torch."""
