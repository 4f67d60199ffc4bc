"""Files are fetched once, whole, verified, and resumed where cut off.

The server is on the loopback interface; nothing goes further.
"""

from concurrent import futures
import email.utils
import errno
import gzip
import hashlib
import io
import os
import pathlib
import struct
import subprocess
import sys
import time
import types

import huggingface_hub
from huggingface_hub import errors as hub_errors
import loopback
import numpy as np
import pytest
import safetensors.numpy

from ddo_jax import errors
from ddo_jax.assets import download

# As pickles begin and end; nothing else of them is looked at.
MIDDLE = (bytes(range(256)) * 40)[:10_237]
BODY = b'\x80\5' + MIDDLE + b'.'
OTHER_BODY = b'\x80\5' + MIDDLE[::-1] + b'.'
DIGEST = hashlib.sha256(BODY).hexdigest()
OTHER = hashlib.sha256(b'').hexdigest()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
  """The seconds that downloads waited; nobody does."""
  waited = []
  clock = types.SimpleNamespace(sleep=waited.append)
  monkeypatch.setattr(download, 'time', clock)
  return waited


@pytest.fixture
def site():
  """A server; `.url` is the address of a file there."""
  with loopback.serve(BODY) as made:
    made.url = f'{made.url}/edm/edm-x.pkl?token=secret'
    yield made


def refusal(*args, **kwargs):
  with pytest.raises(errors.UserError) as caught:
    download.fetch(*args, **kwargs)
  line = str(caught.value)
  assert '\n' not in line
  return line


def names(folder):
  """Of all files but the locks, which may stay."""
  files = (p for p in folder.rglob('*') if p.is_file())
  return sorted(p.name for p in files if p.suffix != '.lock')


def test_a_file_is_fetched_once(site, tmp_path):
  for sha256 in (None, DIGEST, DIGEST.upper()):
    path = download.fetch(site.url, sha256, tmp_path)
    assert path.name == 'edm-x.pkl' and path.read_bytes() == BODY
  assert site.asked == [(None, None)]
  assert names(tmp_path) == ['edm-x.pkl', 'edm-x.pkl.sha256']
  other = download.fetch(site.url.replace('/edm/', '/edm2/'), cache=tmp_path)
  assert other != path and len(site.asked) == 2


@pytest.mark.parametrize('header', ['ETag', 'Last-Modified'])
def test_a_download_that_is_cut_off_goes_on(site, tmp_path, header):
  site.header, site.cut = header, 3000
  assert '3000 of 10240 bytes came' in (
    line := refusal(site.url, None, tmp_path)
  )
  assert 'run the same command again' in line
  site.cuts = [7000]
  site.cut = None
  path = download.fetch(site.url, DIGEST, tmp_path)
  assert path.read_bytes() == BODY
  assert site.asked == [
    (None, None),
    ('bytes=3000-', '"one"'),  # at once, which brought nothing
    ('bytes=3000-', '"one"'),
    ('bytes=7000-', '"one"'),
  ]
  assert names(tmp_path) == ['edm-x.pkl', 'edm-x.pkl.sha256']


@pytest.mark.parametrize(
  'change',
  [
    {'version': '"two"', 'body': OTHER_BODY},  # the file was replaced
    {'ranges': False, 'body': OTHER_BODY},  # the server knows no ranges
  ],
)
def test_a_download_that_cannot_go_on_starts_again(site, tmp_path, change):
  site.cut = 3000
  refusal(site.url, None, tmp_path)
  site.cut = None
  vars(site).update(change)
  path = download.fetch(site.url, cache=tmp_path)
  assert path.read_bytes() == OTHER_BODY
  assert site.asked[-1] == ('bytes=3000-', '"one"')


@pytest.mark.parametrize('version', ['', 'W/"weak"'])
def test_without_a_version_nothing_is_continued(site, tmp_path, version):
  site.version, site.cut = version, 3000
  refusal(site.url, None, tmp_path)
  site.cut = None
  assert download.fetch(site.url, None, tmp_path).read_bytes() == BODY
  assert site.asked == [(None, None)] * 2


def test_a_server_that_continues_elsewhere_is_refused(site, tmp_path):
  site.cut = 3000
  refusal(site.url, None, tmp_path)
  site.cut, site.shift = None, 1
  assert 'another range' in refusal(site.url, None, tmp_path)
  site.shift = 0
  assert download.fetch(site.url, None, tmp_path).read_bytes() == BODY


def test_what_came_whole_but_unfinished_is_asked_again(site, tmp_path):
  site.cut = 3000
  refusal(site.url, None, tmp_path)
  (partial,) = tmp_path.rglob('*.partial')
  partial.write_bytes(BODY)  # stopped before it was put in its place
  site.cut = None
  assert download.fetch(site.url, DIGEST, tmp_path).read_bytes() == BODY
  assert site.asked[2:] == [('bytes=10240-', '"one"'), (None, None)]


def test_a_length_need_not_be_known(site, tmp_path):
  site.length = False
  assert download.fetch(site.url, DIGEST, tmp_path).read_bytes() == BODY


def test_a_wrong_sha256_leaves_nothing(site, tmp_path):
  line = refusal(site.url, OTHER, tmp_path)
  assert DIGEST in line and OTHER in line and 'thrown away' in line
  assert names(tmp_path) == []
  path = download.fetch(site.url, DIGEST, tmp_path)
  assert 'correct the sha256' in refusal(site.url, OTHER, tmp_path)
  assert path.exists() and len(site.asked) == 2


def test_a_cached_file_that_was_damaged_is_fetched_again(site, tmp_path):
  path = download.fetch(site.url, None, tmp_path)
  path.write_bytes(BODY[:-1])
  assert download.fetch(site.url, None, tmp_path).read_bytes() == BODY
  assert len(site.asked) == 2


@pytest.mark.parametrize('page', [b'\n<!DOCTYPE html><p>', b'<HTML>log in'])
def test_a_web_page_in_place_of_a_file(site, tmp_path, page):
  site.body = page
  assert 'it is a web page (HTML)' in refusal(site.url, None, tmp_path)
  assert names(tmp_path) == []


def test_two_processes_fetch_a_file_once(site, tmp_path):
  """The second waits, and finds what the first brought."""
  site.pause = 0.1
  with futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda _: download.fetch(site.url, None, tmp_path), '1234')
  assert len(set(found)) == len(site.asked) == 1


@pytest.mark.parametrize('status', [401, 404, 416, 501])
def test_what_the_server_refuses(site, tmp_path, status, waits):
  site.status = status
  assert f'the server answers {status}' in refusal(site.url, None, tmp_path)
  assert names(tmp_path) == [] and not waits


@pytest.mark.parametrize('status', [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(site, tmp_path, status, waits, caplog):
  site.answers = [status, status]
  with caplog.at_level('INFO'):
    assert download.fetch(site.url, DIGEST, tmp_path).read_bytes() == BODY
  assert waits == [2, 4] and len(site.asked) == 3
  assert f'answers {status}; asking again in 4 s (2 of 5)' in caplog.text


def test_patience_ends(site, tmp_path, waits):
  site.status = 503
  assert 'the server answers 503' in refusal(site.url, None, tmp_path)
  assert waits == [2, 4, 8, 16, 32]


def in_seconds(seconds):
  return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
  ('after', 'seconds'),
  [
    ('7', 7),
    (100.0, 100),
    (-100.0, 0),
    ('soon', 2),
    ('', 2),
    ('-5', 2),
    ('Mon, 99 Foo 2999', 2),
  ],
)
def test_what_a_busy_server_asks(site, tmp_path, waits, after, seconds):
  if isinstance(after, float):
    after = in_seconds(after)
  site.answers = [503]
  site.headers = {'Retry-After': after}
  assert download.fetch(site.url, None, tmp_path).read_bytes() == BODY
  assert abs(waits[0] - seconds) < 50 and (seconds > 10 or waits == [seconds])


@pytest.mark.parametrize('after', ['86400', '9' * 9, 1e6])
def test_a_server_that_asks_for_too_much(site, tmp_path, waits, after):
  if isinstance(after, float):
    after = in_seconds(after)
  site.status = 429
  site.headers = {'Retry-After': after}
  assert 'asks to wait' in refusal(site.url, None, tmp_path) and not waits


def test_a_connection_that_is_reset(site, tmp_path):
  site.resets = True
  site.cuts = [3000, 7000]
  assert download.fetch(site.url, DIGEST, tmp_path).read_bytes() == BODY
  assert len(site.asked) == 3


@pytest.mark.parametrize('length', ['abc', '-5', '1e9', '0x10', ''])
def test_a_length_that_is_no_number(site, tmp_path, length):
  site.length = length
  assert download.fetch(site.url, DIGEST, tmp_path).read_bytes() == BODY


def test_a_length_without_end(site, tmp_path):
  site.length = str(10**18)
  line = refusal(site.url, None, tmp_path)
  assert 'takes 1,000,000,000,000,000,000 bytes' in line and 'has room' in line
  assert names(tmp_path) == []


def npz():
  file = io.BytesIO()
  np.savez_compressed(file, mu=np.zeros(5_000))
  return file.getvalue()


WHOLE = {
  'x.pkl': BODY,
  'x.npz': npz(),
  'x.zip': npz(),
  'x.pth': npz(),
  'x.safetensors': safetensors.numpy.save(
    {'a': np.zeros(999), 'b': np.ones(9)}
  ),
  'x.gz': gzip.compress(bytes(5_000)),
  'x.pb': b'\x0a\xac\x02' + bytes(300) + b'\x18\x05' + b'\x22\x03abc',
}


@pytest.mark.parametrize('name', WHOLE)
def test_a_body_that_is_cut_off_without_a_length(site, tmp_path, name):
  """It is not kept, and the next call asks again."""
  body = WHOLE[name]
  url = f'{site.url.partition("/edm")[0]}/{name}'
  site.length = False
  for wrong in (
    *(body[: len(body) * k // 7] for k in range(7)),
    body[:-1],
    b'<!doctype html>',
    b'{"error": "busy"}',
    b'ok',
    bytes(500),
    b'[' * 100_000,
    struct.pack('<Q', 2**63) + bytes(99),
    struct.pack('<Q', 99_999) + b'[' * 99_999,
  ):
    site.body = wrong
    line = refusal(url, None, tmp_path)
    assert 'was thrown away, for it is' in line and 'run the same' in line
    assert names(tmp_path) == []
  site.body = body
  assert download.fetch(url, None, tmp_path).read_bytes() == body


def test_what_was_kept_before_it_was_looked_at(site, tmp_path):
  """A file that an earlier version kept, cut off, with its hash."""
  path = download.fetch(site.url, None, tmp_path)
  path.write_bytes(BODY[:99])
  digest = hashlib.sha256(BODY[:99]).hexdigest()
  path.with_name('edm-x.pkl.sha256').write_text(f'{digest}  edm-x.pkl\n')
  assert download.fetch(site.url, None, tmp_path).read_bytes() == BODY
  path.with_name('edm-x.pkl.sha256').write_text('')
  assert download.fetch(site.url, None, tmp_path).read_bytes() == BODY
  assert len(site.asked) == 3


@pytest.mark.parametrize(
  ('url', 'words'),
  [
    ('http://[::1/x.pkl', 'is no address'),
    ('http://[::1]]/x.pkl', ''),
    ('http://host:port/x.pkl', 'is no address'),
    ('http://host:99999/x.pkl', 'is no address'),
    ('http://h\u00f6st/x.pkl', "holds 'ö'"),
    ('http://host/gr\u00f6\u00dfe.pkl', 'wanted %C3%B6 for it'),
    ('http://host/a b/x.pkl', 'wanted %20 for it'),
    ('http://host/a\r\nX: y/x.pkl', 'wanted %0D for it'),
    (f'http://{"a" * 100}.b/x.pkl', ''),
    ('http:///x.pkl', ''),
    ('http://\u2100/x.pkl', 'is no address'),
  ],
)
def test_what_is_no_address(tmp_path, url, words):
  line = refusal(url, None, tmp_path)
  assert words in line


@pytest.mark.parametrize('header', ['Location', 'Nothing'])
def test_a_redirection_without_an_end(site, tmp_path, header):
  site.status = 302
  site.headers = {header: '/x.pkl'}
  assert 'the server answers 302' in refusal(site.url, None, tmp_path)


def test_a_redirection_to_a_file_of_this_machine(site, tmp_path):
  site.status = 302
  site.headers = {'Location': 'file:///etc/passwd'}
  assert 'the server answers 302' in refusal(site.url, None, tmp_path)


def test_a_version_that_would_be_refused_ever_after(site, tmp_path):
  site.version = '"one\r\n two"'
  site.cut = 3000
  refusal(site.url, None, tmp_path)
  site.cut = None
  assert download.fetch(site.url, DIGEST, tmp_path).read_bytes() == BODY


def test_no_network(tmp_path, site):
  url = 'http://127.0.0.1:9/x.pkl'  # the discard port: nobody listens
  line = refusal(url, None, tmp_path)
  assert f'no network to {url}' in line and 'give its path' in line


def test_a_full_disk(site, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  site.cut = 3000
  refusal(site.url, None, tmp_path)
  assert len(names(tmp_path)) == 2
  monkeypatch.setattr(download, '_receive', full)
  assert 'disk full while fetching' in refusal(site.url, None, tmp_path)
  assert names(tmp_path) == []


@pytest.mark.parametrize(
  'url',
  ['http://host/', 'http://host', 'http://host/a/%2e%2e', 'http://h/%5cx'],
)
def test_addresses_without_a_file(tmp_path, url):
  assert 'names no file' in refusal(url, None, tmp_path)


def test_a_local_file(tmp_path):
  path = tmp_path / 'x.pkl'
  path.write_bytes(BODY)
  assert download.fetch(str(path)) == download.fetch(str(path), DIGEST) == path
  assert f'has sha256 {DIGEST}; wanted {OTHER}' in refusal(str(path), OTHER)
  assert path.exists()
  assert 'no file' in refusal(str(tmp_path / 'none.pkl'))
  assert 'no file' in refusal(str(tmp_path))
  assert 'unknown scheme ftp://' in refusal('ftp://host/x.pkl')
  for wrong in ('', 'abc', DIGEST + '0', 'g' * 64):
    assert 'wanted 64 hexadecimal' in refusal(str(path), wrong)


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """The hub's library, answering from a folder laid out as its cache."""
  calls = []
  blobs = tmp_path / 'blobs'
  blobs.mkdir()
  (blobs / DIGEST).write_bytes(BODY)
  (tmp_path / 'x.pkl').symlink_to(blobs / DIGEST)

  def hf_hub_download(repo, name, *, revision, cache_dir):
    calls.append((repo, name, revision, cache_dir))
    return str(tmp_path / 'x.pkl')

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
  return calls


def test_a_file_of_the_hub(hub, tmp_path):
  path = download.fetch('hf://owner/na.me/x.pkl')
  assert path.read_bytes() == BODY
  download.fetch('hf://owner/name@49257a0/sub/x.pkl', DIGEST, tmp_path)
  assert hub == [
    ('owner/na.me', 'x.pkl', None, None),
    ('owner/name', 'sub/x.pkl', '49257a0', tmp_path),
  ]
  assert 'has sha256' in refusal('hf://owner/name/x.pkl', OTHER)
  (tmp_path / 'blobs' / DIGEST).write_bytes(BODY[1:])
  assert f'wanted {DIGEST}' in refusal('hf://owner/name/x.pkl')


@pytest.mark.parametrize(
  'source', ['hf://owner', 'hf://owner/name', 'hf://a/b c/d']
)
def test_names_that_the_hub_cannot_have(hub, source):
  assert 'wanted hf://owner/name/file' in refusal(source) and hub == []


@pytest.mark.parametrize(
  ('error', 'words'),
  [
    (
      hub_errors.LocalEntryNotFoundError('a\nb'),
      'no network to the Hugging Face',
    ),
    (hub_errors.EntryNotFoundError('no such\nfile'), 'does not give'),
    (ConnectionResetError('reset'), 'does not give'),
    (hub_errors.HFValidationError('bad name'), 'bad name'),
  ],
)
def test_what_the_hub_refuses(monkeypatch, error, words):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
  assert words in refusal('hf://owner/name/x.pkl')


def through_the_hub(cache, **settings):
  """Runs fetch in a process whose hub has settings of its own."""
  code = (
    'import pathlib, sys; from ddo_jax.assets import download;'
    ' print(download.fetch(sys.argv[1], None, pathlib.Path(sys.argv[2])))'
  )
  return subprocess.run(
    [sys.executable, '-c', code, 'hf://owner/name/edm/x.pkl', str(cache)],
    env=os.environ | settings,
    capture_output=True,
    text=True,
  )


def test_the_hubs_own_library(site, tmp_path):
  site.version = f'"{DIGEST}"'
  done = through_the_hub(tmp_path, HF_ENDPOINT=site.url.partition('/edm/')[0])
  path = pathlib.Path(done.stdout.strip())
  assert path.name == 'x.pkl' and path.read_bytes() == BODY, done.stderr
  assert path.resolve().name == DIGEST  # what is held against its bytes
  assert '/owner/name/resolve/main/edm/x.pkl' in site.asked


def test_the_hub_without_a_network(tmp_path):
  done = through_the_hub(tmp_path, HF_HUB_OFFLINE='1')
  assert 'UserError: no network to the Hugging Face hub' in done.stderr
