"""A chat page beside the server's API: python examples/chat_page.py BUNDLE [--port 8000]

BUNDLE is a compiled chat model. The page at /chat talks to /v1/chat/completions of the same server, which is that of
`hasten serve`: /v1/…, /metrics and the built-in page at / are there too. A reader who presses "Stop", or leaves, frees
the model for the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

import hasten
from runtimes.serve.app import build_app
from runtimes.serve.models import Models
from runtimes.serve.options import ServeOptions
from runtimes.serve.protocol import guarded
from runtimes.serve.run import listen, url_of

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0 auto; max-width: 46rem; height: 100dvh; display: flex; flex-direction: column }
main { flex: 1; overflow-y: auto; padding: 1rem }
article { margin: .5rem 0; padding: .6rem .9rem; border-radius: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
.user { background: #4477cc33; margin-left: 20% }
.assistant { background: #88888822; margin-right: 10% }
.error { border: 1px solid #cc4444 }
form { display: flex; gap: .5rem; padding: 1rem }
textarea { flex: 1; font: inherit; padding: .5rem; border-radius: .5rem; resize: none }
button { font: inherit; padding: 0 1.2rem; border-radius: .5rem }
"""
SCRIPT = """
const talk = document.querySelector('main'), form = document.querySelector('form');
const box = form.querySelector('textarea'), button = form.querySelector('button');
const messages = [];
let stop = null;

function say(kind, text) {
  const said = document.createElement('article');
  said.className = kind;
  said.textContent = text;
  talk.append(said);
  talk.scrollTop = talk.scrollHeight;
  return said;
}

async function* deltas(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (let part; !(part = await reader.read()).done;) {
    held += part.value;
    const events = held.split('\\n\\n');
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith('data:')) continue;
      const data = event.slice(5).trim();
      if (data === '[DONE]') return;
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      yield told.choices?.[0]?.delta?.content ?? '';
    }
  }
}

async function ask(text) {
  messages.push({ role: 'user', content: text });
  say('user', text);
  const said = say('assistant', '');
  said.setAttribute('aria-busy', 'true');
  stop = new AbortController();
  button.textContent = 'Stop';
  try {
    const response = await fetch('/v1/chat/completions', {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'chat', messages, stream: true, max_tokens: 512 }),
      signal: stop.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const delta of deltas(response)) {
      said.textContent += delta;
      talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    if (error.name !== 'AbortError') say('error', error.message);
  }
  said.removeAttribute('aria-busy');
  if (said.textContent) messages.push({ role: 'assistant', content: said.textContent });
  else { said.remove(); messages.pop(); }
  stop = null;
  button.textContent = 'Send';
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  const text = box.value.trim();
  if (stop) stop.abort();
  else if (text) { box.value = ''; ask(text); }
});
box.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
});
box.focus();
"""
PAGE = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Chat</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><main aria-live="polite"></main>
<form><textarea rows="2" aria-label="Message" placeholder="Message"></textarea><button>Send</button></form>
<script>{SCRIPT}</script></body></html>
"""


def hash_of(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {hash_of(SCRIPT)}; style-src {hash_of(STYLE)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: Request) -> Response:
    return Response(PAGE, media_type="text/html", headers={"content-security-policy": POLICY})


async def serve(bundle: Path, port: int) -> None:
    """Load the model, serve until a signal comes, and finish what was accepted."""
    options = ServeOptions(port=port, drain=5.0)
    with listen(options.host, options.port) as listener:
        models = Models({"chat": bundle}, hasten.serve_engine, drain=options.drain)
        await models.start()

        @asynccontextmanager
        async def live(app: Starlette) -> AsyncIterator[None]:
            print(f"{url_of(listener, tls=False)}/chat", flush=True)
            yield
            await models.close()

        app = Starlette(routes=[Route("/chat", page), Mount("/", build_app(models, options))], lifespan=live)
        config = uvicorn.Config(app, http=guarded(options), log_level="warning", timeout_graceful_shutdown=5)
        await uvicorn.Server(config).serve(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000, help="0: a free one [default: 8000]")
    asked = parser.parse_args()
    try:
        asyncio.run(serve(asked.bundle, asked.port))
    except hasten.HastenError as error:
        sys.exit(f"chat_page: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
