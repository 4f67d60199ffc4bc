"""What was checked of a run, and what was not, in sentences."""

from ddo_jax.report import run_folder
from ddo_jax.report import scores


def _training(run: run_folder.Run) -> list[str]:
  """Returns what the training loop saw to."""
  lines = []
  starts = [
    log['max_abs_logit']
    for stage in run.stages.values()
    for log in stage
    if log['step'] == 0 and log.get('max_abs_logit') is not None
  ]
  if starts:
    lines.append(
      f'Step 0 of every round stood at chance: largest |βr| {max(starts):.2g},'
      ' where a run stops above 0.001.'
    )
  if run.stages or run.pretrain:
    lines.append(
      'Loss and gradient norm were finite at every step; a run stops otherwise.'
    )
  return lines


def _evaluator(run: run_folder.Run) -> list[str]:
  """Returns what the scores were measured with."""
  result = run.rounds[-1]
  about = result.get('evaluator', {})
  lines = []
  if 'classifier' in about:
    splits = about['classifier']
    line = (
      'Scores are in the features of a small classifier that was fitted to'
      f' {splits["train"]}; {splits["test"]} was held out'
    )
    if 'held_out_copies' in splits:  # earlier versions did not count
      line += (
        f': it names {splits["held_out_accuracy"]:.1%} of these'
        f' {splits["held_out_images"]:,} images rightly, and'
        f' {splits["held_out_copies"]} of them are copies of training images'
      )
    lines.append(f'{line}.')
  if 'protocol' in about:
    name = about['protocol']['name']
    file = about['files'].get('fid_stats', {})
    digest = file.get('sha256', '')[:12]
    source = f' (sha256 {digest}…)' if digest else ''
    lines.append(
      f'Scores are under the protocol {name}, against its file of statistics'
      f'{source}.'
    )
  if result.get('labels'):
    lines.append(f'Classes of the scored samples: {result["labels"]}.')
  return lines


def checked(run: run_folder.Run) -> list[str]:
  """Returns what was checked, a sentence each."""
  lines = _training(run)
  if not run.rounds:
    return lines
  selection = run.config['evaluation.selection_samples']
  lines.append(
    f'The scores are of {scores.sizes(run)}; the checkpoints were chosen by'
    f' {selection:,} samples of another seed.'
  )
  lines += _evaluator(run)
  if not any(run.warnings().values()):
    lines.append(
      'The discriminator neither saturated nor stayed at chance in the second'
      ' half of any round, and no round left what its reference had.'
    )
  return lines


def unchecked(run: run_folder.Run) -> list[str]:
  """Returns what a reader might take for granted, and was not checked."""
  if not run.rounds:
    return []
  result = run.rounds[-1]
  about = result.get('evaluator', {})
  lines = [
    'Another training seed: ± is over sampling seeds of one training run.'
  ]
  if 'classifier' in about:
    lines.append(
      'Published numbers: a distance in the features of a classifier of this'
      ' data is no FID.'
    )
  near = result.get('sheets', {}).get('neighbours')
  if near:
    lines.append(
      'Copies that are shifted, mirrored or recoloured: distances to training'
      ' images are pixel by pixel.'
    )
  return lines + [
    f'{note[:1].upper()}{note[1:]}.' for note in result.get('notes', [])
  ]
