"""A server of chat completions for the tests, in a process of its own: it annotates well, or misbehaves as often as it is told to.

    python tests/fault_server.py LOG [SETTINGS]        # prints its port; SETTINGS is JSON, see DEFAULTS

Each request, with all that it asked, and each good answer that went out whole is a line of LOG: {"what", "response", ...}.
"""

import json
import random
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS_FAULTS = ("429", "500")
LINE_FAULTS = ("silence", "drop", "cut", "empty body", "broken body")
TEXT_FAULTS = (
    "no json",
    "no content",
    "wrong quote",
    "wrong types",
    "too long",
    "length",
    "no critique",
    "many quotes",
)
FAULTS = STATUS_FAULTS + LINE_FAULTS + TEXT_FAULTS
DEFAULTS = {
    "rate": 0.0,  # how often it misbehaves, in all the ways of `faults` alike
    "faults": FAULTS,
    "seed": 0,
    "status": None,  # every request ends with this status, the key that it came with in the body
    "refuses": [],  # options that it refuses with 400: a name, or a type of response_format
    "names_them": True,  # and whether the error names the option
    "usage": [100, 50],  # the tokens that it says an answer cost
    "seconds": 0.0,  # that an answer takes
    "poison": None,  # a response with this word in it gets status 500
    "trickle": 0,  # so many bytes of white space come first, one every 0.1 s
    "answer": None,  # what it says in place of an annotation
}


def annotation(response):
    """A good annotation, the same each time: the first word is good and the last one poor."""
    words = response.split()
    thoughts = {
        "reasoning": "Word by word.",
        "critique": f"It has {len(words)} words; the last one is weak.",
    }
    return {**thoughts, "good_spans": words[:1], "poor_spans": words[-1:]}


def spoilt(fault, said):
    """The text of an annotation with a fault in it."""
    if fault == "wrong quote":
        said["good_spans"] = ["no such words anywhere"]
    elif fault == "wrong types":
        said["poor_spans"] = "a text"
    elif fault == "no critique":
        said["critique"] = " "
    elif fault == "many quotes":
        said["good_spans"] = said["poor_spans"] * 9
    text = json.dumps(said)
    return {"no json": text[:-9], "no content": "", "too long": text[:-1]}.get(fault, text)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        opening = asked["messages"][0]["content"]
        response = opening.rpartition("### Response\n")[2].partition("\n\n### ")[0].rstrip("\n")
        fault = self.server.fault()
        self.server.note(what="request", response=response, fault=fault, asked=asked)
        time.sleep(self.server.settings["seconds"])
        refused = [
            name
            for name in self.server.settings["refuses"]
            if name in asked or name == asked.get("response_format", {}).get("type")
        ]
        if status := self.server.settings["status"]:
            self.send(
                status,
                json.dumps(
                    {
                        "error": {
                            "message": f"bad key {self.headers['Authorization']}",
                            "param": None,
                        }
                    }
                ),
            )
        elif refused:
            param = (
                refused[0] if refused[0] in asked and self.server.settings["names_them"] else None
            )
            self.send(400, json.dumps({"error": {"message": "not supported", "param": param}}))
        elif self.server.settings["poison"] and self.server.settings["poison"] in response:
            self.send(500, "")
        elif fault in STATUS_FAULTS:
            self.send(
                int(fault),
                json.dumps({"error": {"message": "later"}}),
                {"Retry-After": "0.2"} if fault == "429" else {},
            )
        elif fault == "silence":
            self.server.stopping.wait(30)
            self.close_connection = True
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.answer(fault, response)

    def answer(self, fault, response):
        said = annotation(response)
        content = self.server.settings["answer"] or spoilt(fault, said)
        choice = {
            "message": {"content": content},
            "finish_reason": "length" if fault == "length" else "stop",
        }
        usage = dict(zip(("prompt_tokens", "completion_tokens"), self.server.settings["usage"]))
        body = " " * self.server.settings["trickle"] + json.dumps(
            {"choices": [choice], "usage": usage}
        )
        if fault == "cut":  # less than Content-Length promises
            self.send(200, body, {"Content-Length": len(body.encode())}, body[: len(body) // 2])
            self.close_connection = True
        else:
            self.send(
                200, {"empty body": "", "broken body": body[: len(body) // 2]}.get(fault, body)
            )
        if fault is None:
            self.server.note(what="answer", response=response)

    def send(self, status, body, headers=(), sent=None):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(body.encode()),
            **dict(headers),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        for _ in range(self.server.settings["trickle"]):
            self.wfile.write(b" ")
            time.sleep(0.1)
        self.wfile.write(
            (body if sent is None else sent)[self.server.settings["trickle"] :].encode()
        )
        self.wfile.flush()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, log, settings):
        super().__init__(("127.0.0.1", 0), Handler)
        self.settings, self.rng = DEFAULTS | settings, random.Random(settings.get("seed", 0))
        self.log, self.lock, self.stopping = (
            open(log, "a", encoding="utf-8"),
            threading.Lock(),
            threading.Event(),
        )

    def fault(self):
        with self.lock:
            return (
                self.rng.choice(self.settings["faults"])
                if self.rng.random() < self.settings["rate"]
                else None
            )

    def note(self, **line):
        with self.lock:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()

    def handle_error(self, *_):
        """A client that was killed breaks its connections; that is no news."""


if __name__ == "__main__":
    server = Server(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    print(server.server_address[1], flush=True)
    server.serve_forever()
