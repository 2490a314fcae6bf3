#!/usr/bin/env python3
"""SmolLM2 through transformers behind the smallest server that speaks OpenAI's chat completions: greedy, one request at a time.

    python server.py MODEL_FOLDER [--port 8000]

Equal requests get equal bytes: an answer holds no id and no time.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

THREADS = 2


class Chat:
    """A model and its tokenizer; answers are deterministic."""

    def __init__(self, folder):
        torch.set_num_threads(THREADS)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._one_at_a_time = threading.Lock()

    @torch.inference_mode()
    def answer(self, messages, max_tokens):
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with self._one_at_a_time:
            tokens = self._model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)[0]
        return self._tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def handler(chat):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send({"status": "ok"}) if self.path == "/health" else self.send({"error": "not found"}, 404)

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/chat/completions":
                self.send({"error": "not found"}, 404)
                return
            text = chat.answer(asked["messages"], int(asked.get("max_tokens", 64)))
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self.send({"object": "chat.completion", "model": asked.get("model"), "choices": [choice]})

        def send(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="chat completions with SmolLM2")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", options.port), handler(Chat(options.folder)))
    print("ready", flush=True)
    server.serve_forever()
