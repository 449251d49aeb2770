"""What the fit of a generator reads of a run: images (by their keys where Ray Data encoded them), masks, captions.

family               needs                      a row is
flux                 image, caption             the image's middle square, its caption
joint, inpaint       image, mask, caption       both cut about the lesion, its caption
class_conditional    image, diagnosis           the image's middle square, its diagnosis
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.fits.encoded import CachedImages, Encoder
from factory.fits.joint import FitRows
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.encode import keys_in
from factory.runtime.weights import generator_of

NO_IMAGE, NO_MASK, NO_CAPTION = "no_image", "no_image_or_mask", "no_caption"  # why a row is not learnt from
LIGHT = ["record_id", "diagnosis", "source", "split", "outcome"]


def encoder_of(recipe: Recipe) -> Encoder | None:
    """The encoder of the recipe's fit; None for the arm that fits a VAE of its own first."""
    from factory.fits import class_conditional, flux, inpaint, joint

    section, base, size = recipe.fit.lora, generator_of(recipe), recipe.plan.size
    if section.family == "flux":
        return flux.FluxEncoder(base, section.flux.scales or [size])
    if section.family == "inpaint":
        return inpaint.InpaintEncoder(base, size, section.inpaint.dilation)
    if section.family == "class_conditional":
        return class_conditional.ClassEncoder(base, size)
    return None if section.joint.encoding == "pixel4" else joint.JointEncoder(base, size)


def reads_masks(recipe: Recipe) -> bool:
    return recipe.fit.lora.family in ("joint", "inpaint")


def classes_of(recipe: Recipe) -> list[str]:
    """The diagnoses that a class-conditional fit learns."""
    return recipe.fit.lora.class_conditional.classes or recipe.plan.diagnoses


def objective(run: Run, recipe: Recipe) -> Any:
    """The objective of the recipe's generator, on the training rows of a run and held to its validation rows. Its
    `dropped` also counts the training rows that lack what the family needs."""
    from factory.fits import class_conditional, flux, inpaint, joint_arms

    section, base, size = recipe.fit.lora, generator_of(recipe), recipe.plan.size
    own, light, lacking = _rows(run, recipe, "train")
    if not len(own.images):
        by_class = section.family == "class_conditional"
        parts = ("masks and " if reads_masks(recipe) else "") + ("diagnoses" if by_class else "captions")
        raise ValueError(f"fit lora must have training images with {parts}, got none; ingest and caption some.")
    held_out = _rows(run, recipe, "val")[0] if section.validate_every else None
    groups = [[str(value) for value in light[name].to_pylist()] for name in section.balance]
    fitted: Any
    if section.family == "class_conditional":
        fitted = class_conditional.FitClassConditional(
            base, own.images, own.prompts, section, size, classes_of(recipe), held_out, groups
        )
    elif section.family == "flux":
        fitted = flux.FitFluxLora(base, own.images, own.prompts, section, size, run.store, held_out, groups)
    else:
        made = inpaint.FitInpaintLora if section.family == "inpaint" else joint_arms.fit_of
        fitted = made(base, own.images, own.masks, own.prompts, section, size, run.store, held_out, groups)
    fitted.dropped.update(lacking)
    return fitted


def _rows(run: Run, recipe: Recipe, split: str) -> tuple[FitRows, pa.Table, Counter[str]]:
    """The rows of a split that hold all that the family needs, their light columns, and how many do not, by reason."""
    corpus, encoder = run.table("corpus"), encoder_of(recipe)
    keys = None if encoder is None else keys_in(run, encoder.digest, reads_masks(recipe))
    rows = corpus.read(LIGHT if keys is not None else [*LIGHT, "image", "mask"])
    rows = rows.filter(records.accepted(split))
    names, prompts = rows["record_id"].to_pylist(), _prompts(run, recipe, rows)
    if keys is not None:
        seen = [name in keys for name in names]
    else:
        needed = ["image", "mask"] if reads_masks(recipe) else ["image"]
        seen = [all(parts) for parts in zip(*(_present(rows[name]) for name in needed), strict=True)]
    lacks = [
        (NO_MASK if reads_masks(recipe) else NO_IMAGE) if not here else NO_CAPTION if prompt is _NONE else None
        for here, prompt in zip(seen, prompts, strict=True)
    ]
    lacking = Counter(reason for reason in lacks if reason is not None)
    has = [reason is None for reason in lacks]
    rows, prompts = rows.filter(pa.array(has, pa.bool_())), [p for p, here in zip(prompts, has, strict=True) if here]
    if keys is not None:
        found = CachedImages(run.store, tuple(keys[name] for name in rows["record_id"].to_pylist()))
        return FitRows(found, [None] * len(rows), prompts), rows, lacking
    images = pc.struct_field(rows["image"], "bytes").to_pylist()
    masks = pc.struct_field(rows["mask"], "bytes").to_pylist() if reads_masks(recipe) else [None] * len(rows)
    return FitRows(images, masks, prompts), rows, lacking


def _present(column: pa.ChunkedArray) -> list[bool]:
    return list(pc.is_valid(pc.struct_field(column, "bytes")).to_pylist())


_NONE = object()  # a row without a caption; a diagnosis that is not known is a reason of its own


def _prompts(run: Run, recipe: Recipe, light: pa.Table) -> list[Any]:
    if recipe.fit.lora.family == "class_conditional":
        return list(light["diagnosis"].to_pylist())
    captions = run.table("captions").read(["record_id", "caption", "outcome"])
    captions = captions.filter(records.accepted())
    of = dict(zip(captions["record_id"].to_pylist(), captions["caption"].to_pylist(), strict=True))
    return [of.get(name, _NONE) for name in light["record_id"].to_pylist()]
