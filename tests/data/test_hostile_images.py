"""Sets that would hang, or unfold to gigabytes: refused in one line."""

import io
import json
import os
import socket
import struct
import zipfile
import zlib

import bounds
import numpy as np
from PIL import Image
import pytest
import sets

from ddo_jax import errors
from ddo_jax.data import sources
from ddo_jax.data import transforms
from ddo_jax.evaluation import score

FILES = sets.edm_files()
NAME = '00001/img00000003.png'
ZEROS = bytes(2**20)


def refusal(path, **fields):
  """The one short line that refuses a set, which costs little."""
  with bounds.kept():
    line = sets.refusal(path, **fields)
  assert len(line) < 1_000
  return line


def chunk(kind, content):
  raw = kind + content
  return (
    struct.pack('>I', len(content)) + raw + struct.pack('>I', zlib.crc32(raw))
  )


def png(width, height, mode=2, depth=8, data=None):
  """A PNG that announces a size, and holds zeros unless data is given."""
  header = struct.pack('>2I5B', width, height, depth, mode, 0, 0, 0)
  if data is None:
    packer = zlib.compressobj(1)
    left = height * (1 + width * {0: 1, 2: 3, 6: 4}[mode])
    parts = []
    while left > 0:
      parts.append(packer.compress(ZEROS[:left]))
      left -= len(ZEROS)
    data = b''.join(parts) + packer.flush()
  parts = (chunk(b'IHDR', header), chunk(b'IDAT', data), chunk(b'IEND', b''))
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def a_fifo(path):
  os.mkfifo(path)


def a_socket(path):
  # A socket's path must be short.
  before = os.getcwd()
  os.chdir(path.parent)
  try:
    with socket.socket(socket.AF_UNIX) as made:
      made.bind(path.name)
  finally:
    os.chdir(before)


def a_device(path):
  path.symlink_to('/dev/zero')


def a_loop(path):
  path.symlink_to(path.name)


def a_large_file(path):
  path.touch()
  os.truncate(path, 3 * 10**9)  # sparse: nothing is on the disk


PLACED = {
  a_fifo: 'it is a FIFO, not a file',
  a_socket: 'it is a socket, not a file',
  a_device: 'it is a device, not a file',
  a_large_file: 'has 3,000,000,000 bytes',
  a_loop: 'cannot be read',
}


@pytest.mark.parametrize('make', PLACED)
def test_what_is_no_image_file(tmp_path, make):
  path = sets.write(tmp_path / 'set', FILES)
  (path / NAME).unlink()
  make(path / NAME)
  line = refusal(path)
  assert PLACED[make] in line and 'img00000003.png' in line


@pytest.mark.parametrize('make', [a_fifo, a_device, a_large_file])
def test_what_is_no_list_of_labels(tmp_path, make):
  path = sets.write(tmp_path / 'set', FILES)
  (path / 'dataset.json').unlink()
  make(path / 'dataset.json')
  assert 'dataset.json cannot be read' in refusal(path)


@pytest.mark.parametrize('name', ['x.zip', 'x.npz'])
@pytest.mark.parametrize('make', [a_fifo, a_socket, a_device])
def test_what_is_no_set(tmp_path, make, name):
  path = tmp_path / name
  make(path)
  refusal(path)
  with bounds.kept(), pytest.raises(errors.UserError):
    score.open_images(path)


def test_a_folder_called_png(tmp_path):
  path = sets.write(tmp_path / 'set', FILES)
  (path / 'x.png').mkdir()
  assert len(sets.read_all(sets.open_set(path))[0]) == 7


def unfolding(path, name, size, claim=None, kind=zipfile.ZIP_DEFLATED):
  """Adds zeros to a zip under a name; its directory may claim another size."""
  with zipfile.ZipFile(path, 'a', kind) as archive:
    with archive.open(name, 'w', force_zip64=True) as file:
      for _ in range(size // len(ZEROS)):
        file.write(ZEROS)
    if claim is not None:
      archive.getinfo(name).file_size = claim
  return path


@pytest.mark.parametrize('name', [NAME, 'dataset.json'])
def test_a_bomb_in_a_zip(tmp_path, name):
  files = {n: content for n, content in FILES.items() if n != name}
  path = sets.write(tmp_path / 'set.zip', files)
  unfolding(path, name, 300 * 2**20)
  assert 'unfolds to 314,572,800 bytes' in refusal(path)


def test_a_bomb_that_claims_to_be_small(tmp_path):
  files = {n: content for n, content in FILES.items() if n != NAME}
  path = sets.write(tmp_path / 'set.zip', files)
  unfolding(path, NAME, 300 * 2**20, claim=1_000)
  with bounds.kept(most=10**8):
    assert 'img00000003.png' in sets.refusal(path)


@pytest.mark.parametrize('kind', [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions(tmp_path, kind):
  files = {n: content for n, content in FILES.items() if n != NAME}
  path = sets.write(tmp_path / 'set.zip', files)
  unfolding(path, NAME, 2**20, kind=kind)
  assert 'by other means than deflate' in refusal(path)


@pytest.mark.parametrize('name', ['../x.png', '/x.png', 'a/../../x.png'])
def test_names_that_lead_out_of_a_zip(tmp_path, name):
  path = sets.write(tmp_path / 'set.zip', {**FILES, name: b''})
  assert 'which leads out of it' in refusal(path)


def test_a_name_twice_in_a_zip(tmp_path):
  path = sets.write(tmp_path / 'set.zip', FILES)
  with zipfile.ZipFile(path, 'a') as archive, pytest.warns(UserWarning):
    archive.writestr(NAME, b'')
  assert 'two files of one name' in refusal(path)


MANIFESTS = {
  'deep': b'[' * 10**6,
  'deep labels': b'{"labels": ' + b'[' * 10**6 + b']' * 10**6 + b'}',
  'many lists': b'{"labels": [' + b'[],' * 300_000 + b'[]]}',
  'numbers for names': b'{"labels": [[1, 1], ["a", 1]]}',
  'a long name': b'{"labels": [["' + b'x' * 900_000 + b'", 1]]}',
  'a long number': b'{"labels": [["a", ' + b'1' * 900_000 + b']]}',
  'a table': b'{"labels": {"a": 1}}',
  'not UTF-8': b'{"labels": [["\xff\xfe", 1]]}',
}


@pytest.mark.parametrize('content', MANIFESTS.values(), ids=MANIFESTS)
def test_a_list_of_labels(tmp_path, content):
  path = sets.write(tmp_path / 'set', FILES | {'dataset.json': content})
  assert 'dataset.json' in refusal(path)


def test_a_class_that_is_a_long_list(tmp_path):
  entries = json.loads(FILES['dataset.json'])['labels']
  entries[0][1] = list(range(100_000))
  content = json.dumps({'labels': entries}).encode()
  path = sets.write(tmp_path / 'set', FILES | {'dataset.json': content})
  assert 'class of' in refusal(path)


def test_symlinks_in_circles(tmp_path):
  path = sets.write(tmp_path / 'set', FILES)
  (path / '00000/up').symlink_to('..')
  assert len(sets.open_set(path)) == 7
  (path / 'x.png').symlink_to(path / 'x.png')
  assert 'cannot be read' in refusal(path)


def test_symlinks_that_multiply(tmp_path):
  """Thirty folders, each with two links to the next: a walk of 2³⁰."""
  for i in range(30):
    (tmp_path / f'{i}').mkdir()
    for name in 'ab':
      (tmp_path / f'{i}/{name}').symlink_to(f'../{i + 1}')
  sets.write(tmp_path / '30', {'x.png': FILES[NAME]})
  assert 'over and over' in refusal(tmp_path / '0')


def test_names_that_are_not_utf8(tmp_path):
  path = sets.write(tmp_path / 'set', {'a/x.png': FILES[NAME]})
  odd = os.fsencode(path) + b'/\xff'
  os.mkdir(odd)
  with open(odd + b'/\xfe.png', 'wb') as file:
    file.write(FILES[NAME])
  source = sets.open_set(path)
  assert source.class_names == ('a', '\ufffd')
  assert len(sets.read_all(source)[0]) == 2
  with open(odd + b'/\xfe.png', 'wb') as file:
    file.write(b'x')
  assert 'damaged or cut off' in refusal(path)


def test_large_images_are_known_by_their_headers(tmp_path, monkeypatch):
  """Only the first image may be large; none is decoded beside one that fits."""
  content = png(13_000, 13_000, data=b'')
  path = sets.write(tmp_path / 'one', {'a.png': content})
  for fields in ({}, {'resize': 8}):
    with bounds.kept(most=10**7):
      line = sets.refusal(path, **fields)
    assert '13000×13000; an image may have 67,108,864 pixels' in line
  path = sets.write(tmp_path / 'set', FILES | {NAME: png(5_000, 5_000)})
  with bounds.kept(most=4 * 10**7):
    assert 'is [5000, 5000, 3], label' in sets.refusal(path)
  # Cut behind its header: what is read for the size is no more than that.
  path = sets.write(tmp_path / 'set', FILES | {NAME: png(9, 9, data=b'')})
  assert 'is [9, 9, 3], label' in sets.refusal(path)


def test_a_large_image_is_resized(tmp_path):
  path = sets.write(tmp_path / 'set', {'a.png': png(5_000, 5_000, mode=6)})
  with bounds.kept():
    source = sets.open_set(path, resize=4, channels=3)
  assert source.stored_shape == (4, 4, 3)


def test_a_long_strip_is_not_resized(tmp_path):
  path = sets.write(tmp_path / 'set', {'a.png': png(60_000, 2)})
  fields = {'resize': 64, 'resize_by': 'adm'}
  assert 'is 2×60000; an image may have' in refusal(path, **fields)
  assert sets.open_set(path, resize=64).stored_shape == (64, 64, 3)


def test_a_jpeg_of_many_scans(tmp_path):
  """A few hundred kilobytes that would be gone over 600 times."""
  image = Image.new('RGB', (4_000, 4_000))
  file = io.BytesIO()
  image.save(file, 'JPEG', progressive=True, quality=5)
  content = file.getvalue()
  path = sets.write(tmp_path / 'set', {'a.jpg': content})
  assert sets.open_set(path, resize=4).stored_shape == (4, 4, 3)
  scan = content[content.rindex(b'\xff\xda') : -2]
  (path / 'a.jpg').write_bytes(content[:-2] + 600 * scan + b'\xff\xd9')
  with bounds.kept(seconds=1):
    line = sets.refusal(path, resize=4)
  assert 'is 4000×4000 in 610 scans' in line


def animated(kind):
  frames = [Image.new('RGB', (6, 4), (100 * i, 0, 0)) for i in range(3)]
  file = io.BytesIO()
  frames[0].save(file, kind, save_all=True, append_images=frames[1:])
  return file.getvalue()


def in_format(kind, mode='RGB'):
  return sets.save(Image.new(mode, (6, 4)), kind)


EPS = (
  b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\n'
  b'(%stdout) (w) file (ran) writestring\nshowpage\n%%EOF\n'
)
WHOLE = {
  'an animated PNG': (animated('PNG'), 'is an animation'),
  'an animated WebP': (animated('WEBP'), 'is an animation'),
  'an animated GIF': (animated('GIF'), 'is an animation'),
  '16 bits': (in_format('PNG', 'I;16'), "PIL mode 'I;16'"),
  'CMYK': (in_format('JPEG', 'CMYK'), "PIL mode 'CMYK'"),
  'floats': (in_format('TIFF', 'F'), "PIL mode 'F'"),
  'PostScript': (EPS, 'damaged or cut off'),
  'an icon': (in_format('ICO'), 'damaged or cut off'),
  'a drawing': (b'<svg xmlns="x"/>', 'damaged or cut off'),
  'a bomb': (png(60_000, 60_000, data=b''), '60000'),
  'an empty PNG': (png(0, 0, data=b''), ''),
  'a size below 0': (png(2**32 - 1, 2**32 - 1, data=b''), ''),
  'no data': (png(6, 4, data=b''), 'damaged or cut off'),
  'zeros': (bytes(10_000), 'damaged or cut off'),
}


@pytest.mark.parametrize('case', WHOLE)
def test_images_of_other_kinds(tmp_path, case):
  content, words = WHOLE[case]
  path = sets.write(tmp_path / 'set', FILES | {NAME: content})
  line = refusal(path)
  assert words in line and NAME in line


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF'])
def test_images_that_are_cut_off(tmp_path, kind):
  pixels = sets.make_images(1, (24, 24, 3))[0][0]
  content = sets.save(Image.fromarray(pixels), kind)
  source = sets.write(tmp_path / 'set', {'a.png': content})
  assert sets.open_set(source, channels=3).stored_shape == (24, 24, 3)
  for end in (*range(1, 60, 7), len(content) // 2):
    (source / 'a.png').write_bytes(content[:end])
    assert 'replace it' in refusal(source, channels=3)


def npy(shape, dtype='|u1', content=b''):
  """The bytes of a .npy that announces a shape."""
  file = io.BytesIO()
  header = {'descr': dtype, 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue() + content


NPZS = {
  'absurd': npy((10**6, 10**6, 10**6, 3)),
  'negative': npy((-1, 4, 4, 3)),
  'short': npy((9, 4, 4, 3), content=bytes(9 * 48 - 1)),
  'long': npy((9, 4, 4, 3), content=bytes(9 * 48 + 1)),
  'far too long': npy((9, 4, 4, 3), content=bytes(10**6)),
  'objects': npy((9,), '|O', bytes(72)),
  'a header without an end': b'\x93NUMPY\x02\x00\xff\xff\xff\xff'
  + bytes(10**6),
  'nothing': b'',
}


@pytest.mark.parametrize('case', NPZS)
def test_an_array_that_lies(tmp_path, case):
  content = NPZS[case]
  path = sets.write(tmp_path / 'x.zip', {'image.npy': content})
  path = path.rename(tmp_path / 'x.npz')
  line = refusal(path)
  assert 'is no whole .npz' in line
  if case == 'absurd':
    assert 'an array [1000000, 1000000, 1000000, 3] of uint8 in' in line


def test_an_array_that_unfolds(tmp_path):
  """A megabyte of zip that holds 300 MB of blank images."""
  shape = (300, 512, 512, 4)
  path = tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open('image.npy', 'w', force_zip64=True) as file:
      file.write(npy(shape))
      for _ in range(300):
        file.write(ZEROS)
  assert path.stat().st_size < 2 * 2**20
  assert 'unfolds to' in refusal(path)
  with bounds.kept(), pytest.raises(errors.UserError, match='unfolds to'):
    score.open_images(path)


def test_a_latent_that_lies(tmp_path):
  for shape in ((8, 10**6, 10**6), (8, -1, 2), (2**40, 1, 1)):
    path = sets.write(tmp_path / 'set', {'a.npy': npy(shape, '<f4')})
    refusal(path)


def test_blank_images_are_no_bomb(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez_compressed(path, image=np.zeros((1_000, 32, 32, 3), np.uint8))
  assert len(sources.open_npz(path)) == 1_000


def test_the_bound_of_pixels_is_that_of_the_documents():
  assert transforms._MOST_PIXELS == 8_192**2
