"""Run a bundle: probe providers, choose by evidence, tokenize, infer. Needs neither torch nor onnx."""
