"""HTTP: OpenAI's interface, the Open Inference Protocol, metrics and a page, over engines (extra ``serve``)."""
