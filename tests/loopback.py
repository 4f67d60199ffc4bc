"""A publisher on the loopback interface; nothing goes further."""

from collections.abc import Iterator
import contextlib
from http import server
import pathlib
import socket
import struct
import threading
import time


class Handler(server.BaseHTTPRequestHandler):
  """Serves files; the server's fields say what goes wrong.

  Attributes of the server:
    files: contents by name; the body where there are none.
    asked: the range and version of every request for a file.
    answers: the statuses of the first answers; `status` after them.
    headers: what goes with an answer other than 200.
    cuts: where the first bodies end; `cut` after them.
    resets: whether a connection is reset where a body ends early.
  """

  def do_GET(self):
    site, body = self.server, self.server.body
    if site.files:
      body = site.files.get(pathlib.PurePosixPath(self.path).name)
    asked = self.headers.get('Range')
    site.asked.append((asked, self.headers.get('If-Range')))
    time.sleep(site.pause)
    if body is None:
      return self.send_error(404)
    status = site.answers.pop(0) if site.answers else site.status
    if status != 200:
      self.send_response(status)
      for name, value in site.headers.items():
        self.send_header(name, value)
      self.send_header('Content-Length', '0')
      return self.end_headers()
    start = 0
    if asked and site.ranges and self.headers.get('If-Range') == site.version:
      start = int(asked.removeprefix('bytes=').removesuffix('-'))
      if start >= len(body):
        return self.send_error(416)
    self.send_response(206 if start else 200)
    if start:
      first = start + site.shift
      span = f'bytes {first}-{len(body) - 1}/{len(body)}'
      self.send_header('Content-Range', span)
    if site.length is True:
      self.send_header('Content-Length', str(len(body) - start))
    elif site.length:
      self.send_header('Content-Length', site.length)
    if site.version:
      self.send_header(site.header, site.version)
    self.end_headers()
    cut = site.cuts.pop(0) if site.cuts else site.cut
    self.wfile.write(body[start:cut])
    if cut is not None and site.resets:
      # To close with a linger of 0 resets the connection.
      self.wfile.flush()
      linger = struct.pack('ii', 1, 0)
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

  def do_HEAD(self):
    """What the hub's library asks first."""
    self.server.asked.append(self.path)
    self.send_response(200)
    self.send_header('ETag', self.server.version)
    self.send_header('X-Repo-Commit', '0' * 40)
    self.send_header('Content-Length', str(len(self.server.body)))
    self.end_headers()

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serve(
  body: bytes = b'', files: dict[str, bytes] | None = None
) -> Iterator[server.ThreadingHTTPServer]:
  """Yields a server; `.url` is its address."""
  made = server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  made.body, made.status, made.ranges, made.length = body, 200, True, True
  made.header, made.version, made.cut, made.shift = 'ETag', '"one"', None, 0
  made.answers, made.headers, made.cuts, made.resets = [], {}, [], False
  made.asked, made.pause, made.files = [], 0.0, files or {}
  made.url = f'http://127.0.0.1:{made.server_port}'
  thread = threading.Thread(target=made.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield made
  finally:
    made.shutdown()
    thread.join()
    made.server_close()
