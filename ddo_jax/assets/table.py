"""The published files that a run may ask for by name.

Sizes and hashes stand here only where the publisher states them or where
independent records of the file agree. What is not known is recorded when the
file first comes, and held to after; see `store`.
"""

import dataclasses
import pathlib
from typing import Any
import urllib.parse

NVIDIA = (
  'CC BY-NC-SA 4.0 (NVIDIA: EDM, EDM2, DDO): non-commercial use, share alike'
)
VAR = 'MIT (FoundationVision: VAR)'
DIT = 'CC BY-NC 4.0 (Meta: DiT): non-commercial use'
SIT = 'MIT (New York University: SiT); of its weights no separate statement'
LLAMAGEN = (
  'MIT (FoundationVision: LlamaGen); of its weights no separate statement'
)
LLAMAGEN_CCA = (
  'MIT (Tsinghua: CCA, from LlamaGen); of its weights no separate statement'
)
INCEPTION = (
  'Apache-2.0 (Google: the Inception model of 2015-12-05); for this copy of it'
  ' see the publisher of the file'
)
DINOV2 = 'Apache-2.0 (Meta: DINOv2)'

# Names of the folders of the cache.
WEIGHTS = 'weights'  # released generators and their autoencoders
NETWORKS = 'networks'  # of features
FID_STATS = 'fid_stats'
DATA = 'data'


@dataclasses.dataclass(frozen=True)
class Asset:
  """A published file.

  Attributes:
    name: what settings call it; also the name of what it is converted to.
    address: where its publisher has it, https://... or hf://owner/name/file.
    kind: what it holds; the name of its folder in the cache.
    licence: the notice that goes along with all that is made from it.
    size: its bytes; 0: not known.
    megabytes: about how many 10⁶ bytes it has, for those of unknown size.
    sha256: its hash as hex, or the first digits of it; '': not known.
  """

  name: str
  address: str
  kind: str
  licence: str
  size: int = 0
  megabytes: int = 0
  sha256: str = ''

  @property
  def file(self) -> str:
    """Its file's published name, which mirrors and folders have it under."""
    path = urllib.parse.urlsplit(self.address).path
    return pathlib.PurePosixPath(path).name

  def about(self) -> str:
    """Returns its size for a reader, such as 'about 223 MB'."""
    megabytes = round(self.size / 1e6) or self.megabytes
    return f'about {megabytes} MB' if megabytes else 'of a size not known'


_EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm'
_EDM2 = 'https://nvlabs-fi-cdn.nvidia.com/edm2'
_DDO = 'hf://nvidia/DirectDiscriminativeOptimization'
_VAR = 'hf://FoundationVision/var'
_FASHION = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com'


# Folder, file, about how many megabytes. Of two names that differ in 'vp' and
# 've', the networks are DDPM++ and NCSN++.
_RELEASED = (
  (f'{_EDM}/pretrained', 'edm-cifar10-32x32-uncond-vp.pkl', 223),
  (f'{_EDM}/pretrained', 'edm-cifar10-32x32-uncond-ve.pkl', 226),
  (f'{_EDM}/pretrained', 'edm-cifar10-32x32-cond-vp.pkl', 223),
  (f'{_EDM}/pretrained', 'edm-cifar10-32x32-cond-ve.pkl', 226),
  (f'{_EDM}/pretrained', 'edm-ffhq-64x64-uncond-vp.pkl', 247),
  (f'{_EDM}/pretrained', 'edm-ffhq-64x64-uncond-ve.pkl', 251),
  (f'{_EDM}/pretrained', 'edm-afhqv2-64x64-uncond-vp.pkl', 247),
  (f'{_EDM}/pretrained', 'edm-afhqv2-64x64-uncond-ve.pkl', 251),
  (f'{_EDM}/pretrained', 'edm-imagenet-64x64-cond-adm.pkl', 1_184),
  # The best alone, and the two of which the second guides the first.
  (f'{_EDM2}/posthoc-reconstructions', 'edm2-img64-s-1073741-0.075.pkl', 560),
  (f'{_EDM2}/posthoc-reconstructions', 'edm2-img64-s-1073741-0.045.pkl', 560),
  (f'{_EDM2}/posthoc-reconstructions', 'edm2-img64-xs-0134217-0.110.pkl', 250),
  # The second guides the first.
  (f'{_EDM2}/posthoc-reconstructions', 'edm2-img512-l-1879048-0.085.pkl', 1555),
  (f'{_EDM2}/posthoc-reconstructions', 'edm2-img512-xs-0134217-0.165.pkl', 250),
  (_DDO, 'edm-cifar10-uncond-vp-ddo.pkl', 0),
  (_DDO, 'edm-cifar10-cond-vp-ddo.pkl', 0),
  (_DDO, 'edm2-img64-s-ddo.pkl', 0),
  (_DDO, 'edm2-img512-l-ddo.pkl', 0),
  (_DDO, 'var_d16-ddo.pth', 0),
  (_DDO, 'var_d30-ddo.pth', 0),
  (_VAR, 'var_d16.pth', 1_240),
  (_VAR, 'var_d20.pth', 2_400),
  (_VAR, 'var_d24.pth', 4_130),
  (_VAR, 'var_d30.pth', 8_000),
  (_VAR, 'var_d36.pth', 9_400),
  (_VAR, 'vae_ch160v4096z32.pth', 436),  # the tokenizer
)
# What is known exactly of those: size and sha256.
_KNOWN: dict[str, dict[str, Any]] = {
  'edm-cifar10-32x32-uncond-vp.pkl': {
    'sha256': '4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da'
  },
  'vae_ch160v4096z32.pth': {
    'size': 436_075_834,
    'sha256': (
      '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c'
    ),
  },
}
_GENERATORS = tuple(
  Asset(
    name=file.rpartition('.')[0],
    address=f'{folder}/{file}',
    kind=WEIGHTS,
    licence=VAR if folder == _VAR else NVIDIA,
    megabytes=megabytes,
    **_KNOWN.get(file, {}),
  )
  for folder, file, megabytes in _RELEASED
)
_VAE = Asset(
  name='sd-vae-ft-mse',
  address='hf://stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors',
  kind=WEIGHTS,
  licence='MIT (Stability AI: sd-vae-ft-mse)',
  size=334_643_276,
  sha256='a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815',
)
_DIT = 'https://dl.fbaipublicfiles.com/DiT/models'
_TRANSFORMERS = (
  Asset(
    name='DiT-XL-2-256x256',
    address=f'{_DIT}/DiT-XL-2-256x256.pt',
    kind=WEIGHTS,
    licence=DIT,
    megabytes=2_700,
  ),
  Asset(
    name='DiT-XL-2-512x512',
    address=f'{_DIT}/DiT-XL-2-512x512.pt',
    kind=WEIGHTS,
    licence=DIT,
    megabytes=2_700,
  ),
  Asset(
    name='SiT-XL-2-256x256',
    address=(
      'https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/'
      'SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0'
    ),
    kind=WEIGHTS,
    licence=SIT,
    megabytes=2_700,
  ),
)
_LLAMAGEN = 'hf://FoundationVision/LlamaGen'
_LLAMAGEN_CCA = 'hf://ChenDRAG/CCA_LlamaGen/CCA_LlamaGen_Guidance_Free'
# Megabytes of float32; the types of these files are not published.
_RASTER = (
  *(
    Asset(
      name=name,
      address=f'{_LLAMAGEN}/{name}.pt',
      kind=WEIGHTS,
      licence=LLAMAGEN,
      megabytes=megabytes,
    )
    for name, megabytes in (
      ('vq_ds16_c2i', 288),
      ('vq_ds8_c2i', 281),
      ('c2i_B_256', 444),
      ('c2i_L_256', 1_372),
      ('c2i_B_384', 444),
      ('c2i_L_384', 1_372),
      ('c2i_XL_384', 3_099),
      ('c2i_XXL_384', 5_644),
      ('c2i_3B_384', 12_387),
    )
  ),
  *(
    Asset(
      name=f'c2i_{size}_384-cca',
      address=f'{_LLAMAGEN_CCA}/c2i_{size}_384_CCA_0005000.pt',
      kind=WEIGHTS,
      licence=LLAMAGEN_CCA,
      megabytes=megabytes,
    )
    for size, megabytes in (
      ('B', 444),
      ('L', 1_372),
      ('XL', 3_099),
      ('XXL', 5_644),
      ('3B', 12_387),
    )
  ),
)
_INCEPTION_SHA256 = (
  '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
)
_NETWORKS = (
  Asset(
    name='pt_inception-2015-12-05-6726825d',
    address=(
      'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
      'pt_inception-2015-12-05-6726825d.pth'
    ),
    kind=NETWORKS,
    licence=INCEPTION,
    size=95_628_359,
    sha256=_INCEPTION_SHA256,
  ),
  Asset(
    name='weights-inception-2015-12-05-6726825d',
    address=(
      'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
      'weights-inception-2015-12-05-6726825d.pth'
    ),
    kind=NETWORKS,
    licence=INCEPTION,
    size=95_628_359,
    sha256=_INCEPTION_SHA256,
  ),
  Asset(
    name='inception-2015-12-05',
    address=(
      'https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/'
      '1/files/metrics/inception-2015-12-05.pkl'
    ),
    kind=NETWORKS,
    licence=INCEPTION,
    megabytes=91,
  ),
  Asset(
    name='classify_image_graph_def',
    address=(
      'https://openaipublic.blob.core.windows.net/diffusion/jul-2021/'
      'ref_batches/classify_image_graph_def.pb'
    ),
    kind=NETWORKS,
    licence=INCEPTION,
  ),
  Asset(
    name='dinov2_vitl14_pretrain',
    address=(
      'https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/'
      'dinov2_vitl14_pretrain.pth'
    ),
    kind=NETWORKS,
    licence=DINOV2,
    size=1_217_586_395,
    sha256='d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428',
  ),
)
_STATISTICS = (
  Asset(
    name='cifar10-32x32',
    address=f'{_EDM}/fid-refs/cifar10-32x32.npz',
    kind=FID_STATS,
    licence=NVIDIA,
  ),
  Asset(
    name='img64',
    address=f'{_EDM2}/dataset-refs/img64.pkl',
    kind=FID_STATS,
    licence=NVIDIA,
  ),
  Asset(
    name='img512',
    address=f'{_EDM2}/dataset-refs/img512.pkl',
    kind=FID_STATS,
    licence=NVIDIA,
  ),
  Asset(
    name='VIRTUAL_imagenet256_labeled',
    address=(
      'https://openaipublic.blob.core.windows.net/diffusion/jul-2021/'
      'ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz'
    ),
    kind=FID_STATS,
    licence="MIT (OpenAI: guided-diffusion); the images in it are ImageNet's",
    megabytes=2_000,
  ),
)
# Fashion-MNIST's reader knows the hashes of the uncompressed files. Those of
# the .gz depend on the program that compressed them.
_DATA = (
  Asset(
    name='cifar-10-binary',
    address='https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    kind=DATA,
    licence='none stated (Krizhevsky, 2009: to be cited)',
    size=170_052_171,
    sha256='c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
  ),
  *(
    Asset(
      name=f'{part}-ubyte',
      address=f'{_FASHION}/{part}-ubyte.gz',
      kind=DATA,
      licence='MIT (Zalando: Fashion-MNIST)',
      megabytes=megabytes,
    )
    for part, megabytes in (
      ('train-images-idx3', 26),
      ('train-labels-idx1', 1),
      ('t10k-images-idx3', 4),
      ('t10k-labels-idx1', 1),
    )
  ),
)

_ALL = (
  *_GENERATORS,
  *_TRANSFORMERS,
  *_RASTER,
  _VAE,
  *_NETWORKS,
  *_STATISTICS,
  *_DATA,
)
ASSETS = {asset.name: asset for asset in _ALL}


def find(name: str) -> Asset | None:
  """Returns the asset of a name, or of a published file's name."""
  files = {asset.file: asset for asset in ASSETS.values()}
  return ASSETS.get(name) or files.get(name)
