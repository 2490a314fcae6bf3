"""A worker whose answers never end: events, one each 20 ms, as long as somebody takes them."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        if self.path != "/ticks":
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"pong")
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"c\r\ndata: tick\n\n\r\n")
            time.sleep(0.02)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
