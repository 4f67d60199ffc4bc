"""The figures of the paper are drawn of what their computations return."""

import numpy as np
from PIL import Image
import pytest

from configs import digits
from experiments import paper_figures

CURVES = {
  '0.5': {'images': [0, 100, 200], 'score': [0.9, 0.4, 0.6]},
  '1': {'images': [0, 100], 'score': [0.9, 0.3]},  # it was ended early
}
SCORES = {'1': {'fd_train': 0.9, 'accuracy': 0.8}}
COST = {'score': 0.9, 'sd': 0.1, 'parameters': 94_200, 'milliseconds': 0.2}


@pytest.fixture(name='study')
def fixture_study(tmp_path):
  return paper_figures.Study(digits.get_config(), tmp_path, 'accuracy')


@pytest.mark.parametrize(
  ('draw', 'found'),
  [
    (paper_figures.draw_rounds, {'mean': [0.9, 0.3], 'sd': [0.1, 0.0]}),
    (paper_figures.draw_alphas, CURVES),
    (paper_figures.draw_betas, CURVES),
    (paper_figures.draw_best_alpha, CURVES),
    (paper_figures.draw_guidance, {'reference': SCORES, 'DDO': SCORES}),
    (
      paper_figures.draw_costs,
      {'reference': COST, 'discriminator guidance': COST, 'DDO': COST},
    ),
  ],
)
def test_each_figure_is_drawn(study, draw, found):
  path = study.workdir / 'new' / 'figure.png'
  draw(study, found, path)
  pixels = np.asarray(Image.open(path).convert('L'))
  assert min(pixels.shape) > 500
  assert 0.01 < np.mean(pixels < 200) < 0.5  # something is drawn on white


def test_what_is_kept_is_not_made_again(tmp_path):
  path = tmp_path / 'kept.json'
  made = iter([{'a': 1}])
  for _ in range(2):
    assert paper_figures.kept(path, lambda: next(made)) == {'a': 1}


def test_the_guide_is_the_same_network_with_less_training(study, monkeypatch):
  played = []
  monkeypatch.setattr(
    paper_figures.run_lib, 'play', lambda *args: played.append(args)
  )
  config = paper_figures.guide_of(study)
  ((weaker, folder),) = played
  assert (weaker.rounds, weaker.model) == (0, study.config.model)
  assert weaker.pretrain.images * 16 == study.config.pretrain.images
  assert config.guide_from == str(folder / 'pretrain' / 'params')
  # One that the recipe has is taken as it is.
  own = paper_figures.Study(config, study.workdir, 'accuracy')
  assert paper_figures.guide_of(own) is config
  assert len(played) == 1
