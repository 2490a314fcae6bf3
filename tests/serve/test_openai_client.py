"""The official OpenAI client, unchanged, in front of the gateway."""

import asyncio
from pathlib import Path

from msgspec import json

from hotstart.serve.port import Outlook
from hotstart.serve.settings import ModelSettings
from tests.conftest import skip_or_fail
from tests.serve.simulator import break_off, on_loop, stage, until, workers

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".engines" / "clients" / "bin" / "python"


async def break_after_a_word(worker, seen, writer):
    event = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"broken",'
    event += b'"choices":[{"index":0,"delta":{"content":"half"},"finish_reason":null}]}\n\n'
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
    await writer.drain()
    await asyncio.sleep(0.1)
    return await break_off(worker, seen, writer)


@on_loop
async def test_the_official_client_is_served():
    if not PYTHON.exists():
        skip_or_fail("the OpenAI client is not there: scripts/install-clients installs it")
    key = ("sk-test",)
    models = [
        ModelSettings(name, api_keys=key, queue=0 if name == "full" else 9) for name in ("m", "broken", "full", "late")
    ]
    async with workers() as [worker], workers(v1__chat__completions=break_after_a_word) as [bad]:
        async with stage(*models, comment_after_s=0.05) as s:
            s.pool.add(worker, "m")
            s.pool.add(bad, "broken")
            s.pool.outlooks["full"] = Outlook(ready_in_s=3.0)

            async def later():
                await until(lambda: s.gateway.traffic.load("late").waiting == 1)
                await asyncio.sleep(0.2)
                s.pool.add(worker, "late")

            coming = asyncio.ensure_future(later())
            client = await asyncio.create_subprocess_exec(
                PYTHON,
                Path(__file__).with_name("openai_client.py"),
                f"http://127.0.0.1:{s.port}/v1",
                "m",
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await client.communicate()
            coming.cancel()
            assert client.returncode == 0, err.decode()
            said = json.decode(out)
            text = f"hello from {worker.port}"
            assert said == {
                "models": ["m", "broken", "full", "late"],
                "chat": text,
                "stream": text.split(),
                "completion": "hello",
                "embedding": [0.25, 0.5],
                "nobody": "model_not_found",
                "wrong key": "invalid_api_key",
                "broken stream": ["half", "replica_failed"],
                "full": ["queue_full", "3"],
                "late": text.split(),
            }
            late = next(x for x in s.served if x.model == "late")
            assert late.status == 200 and late.queued_s > 0.1
