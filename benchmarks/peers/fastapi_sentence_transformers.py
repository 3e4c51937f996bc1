"""What one writes today: FastAPI in front of sentence-transformers. Usage: ... MODEL PORT BACKEND"""

import sys
from typing import Annotated, Any


def main() -> None:
    """Serve ``POST /embed {"texts": [...]}`` until the process is ended."""
    import uvicorn
    from fastapi import Body, FastAPI
    from sentence_transformers import SentenceTransformer

    model, port, backend = sys.argv[1:]
    encoder = SentenceTransformer(model, device="cpu", backend=backend)
    encoder.encode(["warm up"])
    app = FastAPI()

    # A plain function: FastAPI runs it on a thread, so that clients are served at once.
    @app.post("/embed")  # type: ignore[untyped-decorator]
    def embed(texts: Annotated[list[str], Body(embed=True)]) -> dict[str, Any]:
        return {"vectors": encoder.encode(texts).tolist()}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
