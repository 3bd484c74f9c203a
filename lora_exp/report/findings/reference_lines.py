"""Findings: the share of full fine-tuning's gain, and forgetting."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import RANK, Finding, capital, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, best_by, best_of, contexts, edges
from lora_exp.report.verdicts.verdict import enough, tolerance_of


def full(group: Group) -> Iterator[Finding]:
  """How much of full fine-tuning's gain the best adapter, and the smallest sufficient one, recover."""
  top = group.full
  if top is None:
    yield Finding("Full fine-tuning", "There is no trial with lora=full, so the share of its gain that adapters "
                  "recover is not known; add one.", concluded=False)
    return
  best = best_of(group.adapted)
  for _, settings in (places if len(places := contexts(group, RANK)) == 1 else ()):
    verdict = enough(group, list(best_by(settings, RANK).values()), lambda s: s.values[RANK], RANK)
    best = best if verdict.doubts else verdict.chosen  # the answer, rather than the last thousandth of a nat
  share, base = group.share(best), float('nan') if group.base is None else group.base
  if not share.n:
    yield Finding("Full fine-tuning", f"Full fine-tuning ({top.score.text()}) is not better than the base "
                  f"({base:.4f}), so there is no gain to recover.", f"trials {top.names}", False)
    return
  text = f"Of the gain of full fine-tuning, {best.label} recovers {share.text(1, factor=100)} %"
  if best.trainable and top.trainable:
    text += f" with {best.trainable / top.trainable * 100:.3g} % of its parameters"
  text += f": {best.score.text()} against {top.score.text()}, from a base of {base:.4f}."
  few = min(best.seeds, top.seeds) < SEEDS_NEEDED
  if few:
    text += " One of them has fewer than three seeds."
  if edge := edges(group, top, tolerance_of([top])):
    text += f" {capital(joined(edge))}, so full fine-tuning may do better."
  yield Finding("Full fine-tuning", text, f"trials {best.names} against {top.names}", not few and not edge,
                {"share": share.mean})


def forgetting(group: Group) -> Iterator[Finding]:
  """What the settings lost on `retain`."""
  losses = [(s, s.of(lambda trial: trial.number_at("losses", "forgetting"))) for s in group.settings if s.seeds]
  losses = [(s, e) for s, e in losses if e.n and s.method != "frozen"]
  if len(losses) < 2:
    return
  least, most = min(losses, key=lambda p: p[1].mean), max(losses, key=lambda p: p[1].mean)
  few = min(least[1].n, most[1].n) < SEEDS_NEEDED
  yield Finding("Forgetting", f"The loss on the retained text changed by {least[1].text(sign=True)} ({least[0].label}) "
                f"at the least and by {most[1].text(sign=True)} ({most[0].label}) at the most."
                + (" Fewer than three seeds: no order is concluded." if few else ""),
                f"trials {least[0].names}; {most[0].names}", not few)
