"""Graph to graph: every rewrite hasten knows, and the pipeline that runs them."""
