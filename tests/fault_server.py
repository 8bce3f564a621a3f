"""A server of chat completions that annotates well, or fails as often as its settings say.

    python tests/fault_server.py LOG [SETTINGS]        # prints its port; SETTINGS is JSON

Each request, and each valid answer that was sent completely, is a line of LOG.
"""

import json
import random
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LINE_FAULTS = ("429", "500", "silence", "drop", "cut", "empty body", "broken body")
TEXT_FAULTS = {  # with a word of the fault that the annotator is told
    "no json": "JSON", "no content": "JSON", "too long": "JSON", "wrong quote": "quote 1",
    "wrong types": "valid array", "length": "cut off", "no critique": "empty", "many quotes": "9 quotes",
}  # fmt: skip
FAULTS = (*LINE_FAULTS, *TEXT_FAULTS)
DEFAULTS = {
    "rate": 0.0,  # share of requests that fail, each in a random one of the ways of "faults"
    "faults": FAULTS,
    "status": None,  # status of every answer; its body contains the key
    "refuses": [],  # options that get status 400: a name, or a type of response_format
    "usage": [100, 50],  # the tokens of an answer
    "seconds": 0.0,  # the time of an answer
    "poison": None,  # responses with this word get status 500
    "answer": None,  # the text of every answer, instead of an annotation
}


def annotation(response):
    """A valid annotation: the first word is good and the last one poor."""
    words = response.split()
    critique = f"It has {len(words)} words; the last one is weak."
    quotes = {"good_spans": words[:1], "poor_spans": words[-1:]}
    return {"reasoning": "Word by word.", "critique": critique, **quotes}


def content(fault, response):
    """The text of an answer, valid unless fault is one of TEXT_FAULTS."""
    fields = annotation(response)
    changes = {
        "wrong quote": {"good_spans": ["no such words anywhere"]},
        "wrong types": {"poor_spans": "a text"},
        "no critique": {"critique": " "},
        "many quotes": {"good_spans": fields["poor_spans"] * 9},
    }
    text = json.dumps(fields | changes.get(fault, {}))
    cut = {"no json": -9, "no content": 0, "too long": -1, "length": -5}
    return text[: cut.get(fault)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        opening = asked["messages"][0]["content"]
        response = opening.rpartition("### Response\n")[2].partition("\n\n### ")[0].rstrip("\n")
        settings, fault = self.server.settings, self.server.draw_fault()
        self.server.note(what="request", response=response, fault=fault, asked=asked)
        time.sleep(settings["seconds"])
        names = {*asked, asked.get("response_format", {}).get("type")}
        refused = next((name for name in settings["refuses"] if name in names), None)
        if settings["status"]:
            error = {"message": f"bad key {self.headers['Authorization']}", "param": None}
            self.send(settings["status"], json.dumps({"error": error}))
        elif refused:
            self.send(400, json.dumps({"error": {"message": "not supported"}}))
        elif settings["poison"] and settings["poison"] in response:
            self.send(500, "")
        elif fault in ("429", "500"):
            headers = {"Retry-After": "0.2"} if fault == "429" else {}
            self.send(int(fault), json.dumps({"error": {"message": "later"}}), headers)
        elif fault == "silence":
            time.sleep(30)
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.answer(fault, response)

    def answer(self, fault, response):
        message = {"content": self.server.settings["answer"] or content(fault, response)}
        reason = "length" if fault == "length" else "stop"
        usage = dict(zip(("prompt_tokens", "completion_tokens"), self.server.settings["usage"]))
        choice = {"message": message, "finish_reason": reason}
        body = json.dumps({"choices": [choice], "usage": usage})
        half = body[: len(body) // 2]
        if fault == "cut":  # less than Content-Length promises
            self.send(200, half, {"Content-Length": len(body)})
            self.close_connection = True
        else:
            self.send(200, {"empty body": "", "broken body": half}.get(fault, body))
        if fault is None:
            self.server.note(what="answer", response=response)

    def send(self, status, body, headers=()):
        standard = {"Content-Type": "application/json", "Content-Length": len(body)}
        self.send_response(status)
        for name, value in {**standard, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, log, settings):
        super().__init__(("127.0.0.1", 0), Handler)
        self.settings, self.rng = DEFAULTS | settings, random.Random(0)
        self.log, self.lock = open(log, "a", encoding="utf-8"), threading.Lock()

    def draw_fault(self):
        with self.lock:
            fails = self.rng.random() < self.settings["rate"]
            return self.rng.choice(self.settings["faults"]) if fails else None

    def note(self, **line):
        with self.lock:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()

    def handle_error(self, *_):
        """Ignores the broken connections of a client that was killed."""


if __name__ == "__main__":
    server = Server(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    print(server.server_address[1], flush=True)
    server.serve_forever()
