"""An HTTP server of one file that answers what is asked of it by ranges: ``ranges.py FILE ADDRESS PORT``."""

import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers every GET with a part of the file, which goes from the page cache into the socket."""

    protocol_version = "HTTP/1.1"
    file: int
    size: int

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """One range of bytes."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(found[1]), min(int(found[2]) + 1, self.size)) if found else (0, self.size)
        self.send_response(206 if found else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(end - start))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{self.size}")
        self.end_headers()
        while start < end:
            done = os.sendfile(self.connection.fileno(), self.file, start, end - start)
            if not done:
                self.close_connection = True
                return
            start += done


def main() -> None:
    """Serve until killed."""
    path, address, port = sys.argv[1:]
    with Path(path).open("rb") as file, ThreadingHTTPServer((address, int(port)), Handler) as server:
        server.daemon_threads = True
        Handler.file, Handler.size = file.fileno(), os.fstat(file.fileno()).st_size
        server.serve_forever()


if __name__ == "__main__":
    main()
