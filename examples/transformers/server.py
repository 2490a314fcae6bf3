#!/usr/bin/env python3
"""SmolLM2 through transformers behind the smallest server that speaks OpenAI's chat completions and embeddings, one request at a time.

    python server.py MODEL_FOLDER [--port 8000]

Equal requests get equal bytes, for an answer holds no id and no time; unless they ask for a temperature above 0, the default.
"""

import argparse
import base64
import json
from array import array
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

THREADS = 2
CONTEXT_TOKENS = 2048
DEFAULT_MAX_TOKENS = 64


class Chat:
    """A model and its tokenizer."""

    def __init__(self, folder):
        torch.set_num_threads(THREADS)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, body):
        """Turn the body of a request into the body of its answer; ValueError says what is wrong."""
        messages, max_tokens, temperature, model = read_request(body)
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt_tokens = prompt["input_ids"].shape[1]
        if prompt_tokens + max_tokens > CONTEXT_TOKENS:
            raise ValueError(f"the prompt and max_tokens are {prompt_tokens + max_tokens} tokens, {CONTEXT_TOKENS} fit")
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        made = self._model.generate(**prompt, max_new_tokens=max_tokens, **sampling)[0][prompt_tokens:]
        text = self._tokenizer.decode(made, skip_special_tokens=True)
        ended = int(made[-1]) == self._tokenizer.eos_token_id
        return {
            "object": "chat.completion",
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if ended else "length",
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(made),
                "total_tokens": prompt_tokens + len(made),
            },
        }

    @torch.inference_mode()
    def embed(self, body):
        """Turn the body of a request into the body of its answer: of each text the mean of what its tokens became, at length 1."""
        texts, as_base64, model = read_texts(body)
        prompts = [self._tokenizer(text, return_tensors="pt") for text in texts]
        tokens = sum(prompt["input_ids"].shape[1] for prompt in prompts)
        if any(not 0 < prompt["input_ids"].shape[1] <= CONTEXT_TOKENS for prompt in prompts):
            raise ValueError(f"a text has from 1 to {CONTEXT_TOKENS} tokens")
        means = [self._model.base_model(**prompt).last_hidden_state[0].mean(0) for prompt in prompts]
        vectors = [torch.nn.functional.normalize(mean, dim=0).tolist() for mean in means]
        told = [base64.b64encode(array("f", v).tobytes()).decode() for v in vectors] if as_base64 else vectors
        return {
            "object": "list",
            "model": model,
            "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(told)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def read_texts(body):
    """Return texts, whether their vectors are wanted as base64, and model of a request; ValueError says what is wrong."""
    try:
        request = json.loads(body)
        texts = [request["input"]] if isinstance(request["input"], str) else [*request["input"]]
        encoding = request.get("encoding_format", "float")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError('the body must be JSON with "input", a text or a list of them') from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError('"input" must be a text or a list of them')
    if encoding not in ("float", "base64"):
        raise ValueError('"encoding_format" must be "float" or "base64"')
    return texts, encoding == "base64", request.get("model")


def read_request(body):
    """Return messages, max_tokens, temperature and model of a request; ValueError says what is wrong."""
    try:
        request = json.loads(body)
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in request["messages"]]
        max_tokens = request.get("max_tokens", DEFAULT_MAX_TOKENS)
        temperature = float(request.get("temperature", 0))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError('the body must be JSON with "messages", each with "role" and "content"') from error
    if not messages:
        raise ValueError('"messages" is empty')
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError('"max_tokens" must be a whole number above 0')
    if not 0 <= temperature <= 2:
        raise ValueError('"temperature" must be between 0 and 2')
    return messages, max_tokens, temperature, request.get("model")


def handler_for(chat):
    # One thread computes, whatever the number of connections: requests queue instead of fighting
    # for the cores, and OpenMP keeps one team of threads instead of one for each connection.
    compute = ThreadPoolExecutor(1, thread_name_prefix="compute")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body leave in one packet
        disable_nagle_algorithm = True

        def do_GET(self):
            if self.path == "/health":
                self.reply(200, {"status": "ok"})
            else:
                self.reply_error(404, f"no such path: {self.path}")

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = {"/v1/chat/completions": chat.answer, "/v1/embeddings": chat.embed}.get(self.path)
            if not answer:
                self.reply_error(404, f"no such path: {self.path}")
                return
            try:
                self.reply(200, compute.submit(answer, body).result())
            except ValueError as error:
                self.reply_error(400, str(error))

        def reply_error(self, status, message):
            self.reply(status, {"error": {"message": message}})

        def reply(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def main():
    options = argparse.ArgumentParser(description="Chat completions and embeddings with SmolLM2.")
    options.add_argument("folder")
    options.add_argument("--port", type=int, default=8000)
    chosen = options.parse_args()
    server = Server(("127.0.0.1", chosen.port), handler_for(Chat(chosen.folder)))
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
