"""ONNX Runtime as a device has it: imports numpy and ONNX Runtime only."""
