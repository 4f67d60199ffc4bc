"""Published files by name: found, fetched, held to what is known of them."""

import dataclasses
import hashlib
import json
import logging
import re

import loopback
import pytest

from ddo_jax import errors
from ddo_jax.assets import store
from ddo_jax.assets import table
from ddo_jax.weights import pickle_reader

# As pickles begin and end; nothing else of them is looked at.
MIDDLE = (bytes(range(256)) * 40)[:10_237]
BODY = b'\x80\5' + MIDDLE + b'.'
OTHER_BODY = b'\x80\5' + MIDDLE[::-1] + b'.'
DIGEST = hashlib.sha256(BODY).hexdigest()
NAME = 'edm-cifar10-32x32-cond-vp'
FILE = f'{NAME}.pkl'
SETTING = '--config.init_from'


@pytest.fixture
def site(tmp_path, monkeypatch):
  """A publisher of one file of unknown size and hash; an empty cache."""
  with loopback.serve(files={FILE: BODY}) as made:
    known(monkeypatch, address=f'{made.url}/edm/{FILE}')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.delenv(store.VARIABLE)
    yield made


def known(monkeypatch, **changes):
  """Changes what is known of the file."""
  changed = dataclasses.replace(table.ASSETS[NAME], **changes)
  monkeypatch.setitem(table.ASSETS, NAME, changed)


def place():
  return store.place(table.ASSETS[NAME])


def refusal(name=NAME):
  with pytest.raises(errors.UserError) as caught:
    store.resolve(name, SETTING)
  line = str(caught.value)
  assert '\n' not in line
  return line


def test_the_table_is_sound():
  files = [asset.file for asset in table.ASSETS.values()]
  assert len(set(files)) == len(files)
  for name, asset in table.ASSETS.items():
    assert name == asset.name
    assert table.find(name) == table.find(asset.file) == asset
    assert re.fullmatch(
      r'(https?://|hf://[\w-]+/)[\w.~/-]+(\?[\w=&]+)?', asset.address
    )
    assert re.fullmatch(r'[0-9a-f]{0,64}', asset.sha256)
    assert asset.licence and asset.kind in (
      'weights',
      'networks',
      'fid_stats',
      'data',
    )


def test_a_name_is_fetched_once_and_recorded(site, caplog):
  with caplog.at_level(logging.INFO):
    for name in (NAME, FILE):
      path = store.resolve(name, SETTING)
      assert path == place() and path.read_bytes() == BODY
  assert len(site.asked) == 1
  assert f'fetching {FILE} (about 223 MB) from {site.url}' in caplog.text
  recorded = json.loads(path.with_name(f'{FILE}.json').read_text())
  assert recorded['sha256'] == DIGEST
  assert recorded['source'] == f'{site.url}/edm/{FILE}'
  assert recorded['licence'] == table.NVIDIA


def test_an_interrupted_fetch_goes_on(site):
  site.cut = 3_000
  assert '3000 of 10240 bytes came' in refusal()
  site.cut = None
  assert store.resolve(NAME, SETTING).read_bytes() == BODY
  assert site.asked[-1] == ('bytes=3000-', '"one"')


@pytest.mark.parametrize('sha256', ['0' * 64, '0' * 8])
def test_another_file_than_the_published_is_refused(site, monkeypatch, sha256):
  known(monkeypatch, sha256=sha256)
  line = refusal()
  assert DIGEST in line and f'published file {sha256}' in line
  assert not place().exists()
  known(monkeypatch, sha256=DIGEST[:8], size=1)
  assert 'has 10,240 bytes, the published file 1' in refusal()
  known(monkeypatch, size=len(BODY))
  assert store.resolve(NAME, SETTING) == place()


def test_a_damaged_file_is_named_and_fetched_again(site, caplog):
  """Also where its hash is known from its first coming alone."""
  store.resolve(NAME, SETTING)
  place().write_bytes(OTHER_BODY)
  assert store.resolve(NAME, SETTING).read_bytes() == BODY
  assert f'{place()} is damaged or replaced: its sha256 is' in caplog.text
  # What its publisher replaces is not taken in silence.
  place().unlink()
  site.files[FILE] = OTHER_BODY
  line = refusal()
  assert f'was {DIGEST} when it first came' in line and '.pkl.json' in line
  assert not place().exists()


def test_what_the_user_put_into_the_cache_is_held_to_as_well(site):
  place().parent.mkdir(parents=True)
  place().write_bytes(BODY)
  assert store.resolve(NAME, SETTING) == place()
  assert not site.asked
  place().write_bytes(OTHER_BODY)
  site.status = 501
  assert 'the server answers 501' in refusal()


def test_a_mirror(site, monkeypatch):
  """Also of what lies on the Hugging Face hub."""
  known(monkeypatch, address=f'hf://owner/name/{FILE}')
  monkeypatch.setenv(store.VARIABLE, f'{site.url}/mirror/')
  assert store.resolve(NAME, SETTING).read_bytes() == BODY
  assert store.address(table.ASSETS[NAME]) == f'{site.url}/mirror/{FILE}'
  assert len(site.asked) == 1


def test_a_folder(site, monkeypatch, tmp_path):
  folder = tmp_path / 'published'
  monkeypatch.setenv(store.VARIABLE, str(folder))
  assert f"{store.VARIABLE} is '{folder}', which is no folder" in refusal()
  folder.mkdir()
  (folder / FILE).write_bytes(BODY)
  assert store.resolve(NAME, SETTING) == folder / FILE
  assert not place().exists() and not site.asked
  known(monkeypatch, sha256='0' * 64)
  assert f'{folder / FILE} is not the published' in refusal()
  (folder / FILE).unlink()
  known(monkeypatch, sha256=DIGEST)
  assert store.resolve(NAME, SETTING) == place()  # fetched, as it lacks there


def test_all_that_is_missing_is_said_at_once(site, monkeypatch):
  monkeypatch.setenv(store.VARIABLE, 'http://127.0.0.1:9')
  named = {
    SETTING: NAME,
    '--config.guide_from': 'runs/other/params',
    '--config.vae_from': 'sd-vae-ft-mse',
    '--config.tokenizer_from': '',
  }
  first, second = store.fetch_all(store.wanted(named))
  assert first.startswith(f'{FILE}: no network to http://127.0.0.1:9/{FILE}')
  assert str(place()) in first and f'set {SETTING}' in first
  assert 'diffusion_pytorch_model.safetensors' in second
  assert 'set --config.vae_from' in second


def test_a_path_goes_before_a_name(site, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / FILE).write_bytes(b'mine')
  assert store.resolve(FILE, SETTING).read_bytes() == b'mine'
  assert not site.asked and not place().exists()
  line = refusal('edm-cifar10-32x32-con-vp')
  assert 'no file edm-cifar10-32x32-con-vp' in line
  assert f'did you mean {NAME}' in line


def test_what_was_kept_before_it_was_looked_at(site):
  """A file that an earlier version kept and recorded, cut off."""
  path = store.resolve(NAME, SETTING)
  record = path.with_name(f'{FILE}.json')
  path.write_bytes(BODY[:99])
  about = json.loads(record.read_text())
  about['sha256'] = hashlib.sha256(BODY[:99]).hexdigest()
  record.write_text(json.dumps(about))
  assert store.resolve(NAME, SETTING).read_bytes() == BODY
  assert json.loads(record.read_text())['sha256'] == DIGEST
  assert len(site.asked) == 2


@pytest.mark.parametrize('content', ['', '{', '[]', '[' * 9999])
def test_a_damaged_record_is_made_anew(site, content):
  path = store.resolve(NAME, SETTING)
  record = path.with_name(f'{FILE}.json')
  record.write_text(content)
  assert store.resolve(NAME, SETTING) == path
  assert json.loads(record.read_text())['sha256'] == DIGEST
  assert len(site.asked) == 1


def test_a_file_in_the_cache_that_turns_out_bad(site):
  """It is whole, as far as its end tells, and still no network."""
  path = store.resolve(NAME, SETTING)
  with pytest.raises(errors.UserError) as caught:
    pickle_reader.read_network(path)
  assert 'delete it, and the same command fetches it again' in str(caught.value)
