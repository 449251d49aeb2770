"""The recipe: one complete, typed configuration of a run. YAML in, every mistake at once, by line.

A recipe is layered: the defaults below, then a named or given YAML file, then `--set a.b=c`. Each table and each
fit depends on some sections only, and its fingerprint is made of those (see `FINGERPRINTS`), so that a change
elsewhere does not refuse it. The models live on the ground floor so that a wrong recipe is refused before
anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from factory import taxonomy

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about what it knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _refuse(problems: list[str]) -> None:
    """One error for all that is wrong with a section, a line each; the loader takes it apart again."""
    if problems:
        raise ValueError("\n".join(problems))


class PhantomSection(Section):
    """The phantom corpus, used when no other source is named."""

    count: Natural = 512
    size: Annotated[int, Field(ge=32, le=512)] = 128
    seed: Natural = 2017


class CorpusSection(Section):
    """Where images come from and how they are split."""

    sources: dict[str, str] = {}  # reader name -> path; empty means phantoms
    phantoms: PhantomSection = PhantomSection()
    labels: str | None = None  # a YAML file laid over the label policy, factory/labels.yaml
    allow_missing_images: bool = False  # a published table may be read without its images
    min_side: Annotated[int, Field(ge=16)] = 128  # DermaFlux drops images whose shorter side is below this
    scales: list[Annotated[int, Field(ge=16, le=2048)]] = [128, 256, 512]  # rungs; an image is stored at one
    frame: Literal["keep", "crop", "pad"] = "keep"  # the picture as it is, its central square, or padded to a square
    near_duplicates: Literal["reject", "group"] = "reject"  # of copies one stays, or all do in one group and split
    min_likeness: Share = 0.75  # from which on two images are one photograph
    embedding: str | None = None  # a transformers image model; images that it cannot tell apart share a group
    min_cosine: Share = 0.95  # of two embeddings, from which on it cannot
    max_pixels: Count = 64_000_000  # a larger declared size is refused before it is decoded
    max_bytes: Count = 67_108_864
    unit_rows: Count = 256
    val_share: Share = 0.1
    test_share: Share = 0.1

    @model_validator(mode="after")
    def _scales_reach_min_side(self) -> CorpusSection:
        problems = []
        if not self.scales or min(self.scales) > self.min_side:
            problems.append(f"scales must hold a rung not above min_side ({self.min_side}), got {self.scales}")
        if self.val_share + self.test_share >= 1.0:
            problems.append("val_share + test_share must leave a training split, so be below 1")
        _refuse(problems)
        return self


class HttpSection(Section):
    """How an OpenAI-compatible endpoint is asked. Nothing here changes what it answers but `name`."""

    name: str = ""  # the model's name there
    token_env: str | None = None  # the environment variable that holds the bearer token; the token is never stored
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8  # requests at once
    timeout_s: Positive = 120.0  # of one request, from its first byte sent to its last received
    tries: Count = 6  # of one request that is answered with 408, 429, 5xx, garbage or not at all
    backoff_s: Positive = 1.0  # before the second try; doubled each time, with jitter; Retry-After is honoured
    max_wait_s: Positive = 60.0  # the longest pause
    give_up_after: Count = 32  # requests in a row that came to nothing; then the run stops and can go on later
    max_spend: Annotated[float, Field(ge=0.0)] | None = None  # in the currency of the prices
    price_in: Annotated[float, Field(ge=0.0)] = 0.0  # of a million tokens
    price_out: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _a_cap_has_prices(self) -> HttpSection:
        if self.max_spend is not None and not (self.price_in or self.price_out):
            _refuse(["max_spend needs price_in and price_out, the prices of a million tokens, got none"])
        return self


class CaptionSection(Section):
    """How captions are written: by measuring, or by a vision-language model."""

    captioner: Literal["measured", "transformers", "vllm", "http"] = "measured"
    masks: Literal["measured", "segmenter"] = "measured"  # where a record has none: by colour, or the starter's network
    aspect: Annotated[float, Field(ge=0.1, le=10.0)] | None = None  # width over height that square files had once
    bank: Literal["minimal", "standard", "extended"] = "standard"  # how much a measured caption says
    label_in_prompt: bool = True  # DermaFlux gives the label to the captioner; False is the blind arm
    model: str | None = None  # transformers, vllm: a directory with safetensors; http: the address up to /v1
    prompt: str = "abc"  # an instruction of factory/prompt_files
    prefix: str = "depicts"  # a prefix of factory/prompt_files, put before the model's description
    answer: Literal["json", "text"] = "json"  # json: the schema also constrains decoding where the backend can
    max_new_tokens: Count = 256
    batch_size: Count = 8  # images at once in transformers and vllm
    reject: list[str] = []  # findings that reject a caption (see quality/captions.py); the others are only stored
    http: HttpSection = HttpSection()

    @model_validator(mode="after")
    def _a_model_is_named(self) -> CaptionSection:
        from factory.instructions import prompt_file
        from factory.taxonomy import CAPTION_FINDINGS

        problems = []
        for kind, name in (("instruction", self.prompt), ("prefix", self.prefix)):
            try:
                prompt_file(name, kind)  # type: ignore[arg-type]
            except ValueError as error:
                problems.append(str(error))
        if unknown := sorted(set(self.reject) - set(CAPTION_FINDINGS)):
            problems.append(f"reject must hold findings ({', '.join(CAPTION_FINDINGS)}), got {', '.join(unknown)}")
        if self.captioner != "measured" and not self.model:
            problems.append(f"model must be given for captioner {self.captioner}: a directory, or an address for http")
        if self.captioner == "http" and self.model:
            problems += _address_problems(self.model)
            if not self.http.name:
                problems.append("http.name must be the model's name at the endpoint, got nothing")
        _refuse(problems)
        return self


def _address_problems(address: str) -> list[str]:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"model must be an http:// or https:// address for captioner http, got {address!r}"]
    if parts.username or parts.password or parts.query:
        return ["model must be an address without a user, a password or a query; name the token in http.token_env"]
    return []


class FitSection(Section):
    """What the train loop needs to know of any objective."""

    steps: Count = 200
    batch_size: Count = 16  # over all workers
    learning_rate: Positive = 1e-4
    warmup_steps: Natural = 20
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at zero
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    clip_norm: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # 0 keeps no average
    num_workers: Count = 1
    min_workers: Count | None = None  # the fit goes on with as many, where the cluster shrinks; None: all or none
    sharding: Literal["replicated", "sharded"] = "replicated"  # sharded: each worker holds a piece (FSDP2)
    micro_batch: Count | None = None  # rows of a worker at once, their gradients summed; None: all of its own
    checkpoint_every: Count = 100
    validate_every: Natural = 0  # steps between losses on held-out rows; 0: never
    patience: Natural = 0  # such losses without a better one, after which the fit stops; 0: it does not stop
    preview_every: Natural = 0  # steps between grids of samples, drawn beside the fit; 0: none
    max_memorised: Share | None = None  # share of a grid's samples that may be near copies of training images
    seed: Natural = 0

    @model_validator(mode="after")
    def _stops_have_a_measure(self) -> FitSection:
        problems = []
        if self.patience and not self.validate_every:
            problems.append("patience needs validate_every, the steps between losses on held-out rows, got 0")
        if self.max_memorised is not None and not self.preview_every:
            problems.append("max_memorised needs preview_every, the steps between the grids it is measured on, got 0")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            problems.append(f"min_workers must be at most num_workers ({self.num_workers}), got {self.min_workers}")
        _refuse(problems)
        return self


class FluxSection(Section):
    """What only a LoRA on FLUX.1 asks for (DermaFlux). Its learning rate is 1e-4 by all that is published."""

    preset: Literal["budget", "dermaflux_released", "dermaflux_612m_peft", "dermaflux_text_literal"] | None = "budget"
    # (null: fit.lora.rank on attention; `factory fit list` says what each trains)
    scales: list[Annotated[int, Field(ge=16, le=2048, multiple_of=16)]] = []  # px of a side; empty: plan.size
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 512  # T5 tokens; draw at the length of the fit
    guidance: Positive = 1.0  # the guidance embedding that a distilled model is fitted at
    base_dtype: Literal["bfloat16", "float32", "nf4", "fp8"] = "bfloat16"  # of the frozen base; the LoRA is float32
    gradient_checkpointing: bool = True


class JointSection(Section):
    """What only the joint family asks for (SkinDualGen): its arms, and losses on the decoded image."""

    preset: Literal["budget", "skindualgen_latent8"] | None = None  # null: fit.lora.rank
    encoding: Literal["latent8", "pixel4"] = "latent8"  # two sets of latents, or the mask as a pixel channel of the VAE
    pipeline: Literal["joint", "cascaded"] = "joint"  # image and mask at once, or the mask given the finished image
    mask_steps: Annotated[int, Field(ge=1, le=1000)] = 20  # cascaded: calls for the mask
    ssim_weight: Annotated[float, Field(ge=0.0)] = 0.0  # of 1 - SSIM; this and the next each want a VAE decode a step
    edge_weight: Annotated[float, Field(ge=0.0)] = 0.0  # of the difference of gradients

    @model_validator(mode="after")
    def _a_cascade_has_mask_latents(self) -> JointSection:
        if self.encoding == "pixel4" and self.pipeline == "cascaded":
            _refuse(["pipeline must be joint for the encoding pixel4, whose mask is decoded with the image"])
        return self


class InpaintSection(Section):
    """What only a LoRA for inpainting asks for (DiffAug)."""

    preset: Literal["budget", "diffaug"] | None = "budget"  # null: fit.lora.rank on attention
    lambda_preserve: Annotated[float, Field(ge=0.0)] = 0.1  # weight of what is changed outside the mask
    preserve_below: Share = 0.4  # of the timesteps; above, a clean estimate says little of the background
    dilation: Annotated[float, Field(ge=0.0, le=0.5)] = 0.02  # of the side; how far what is redrawn exceeds the lesion
    gradient_checkpointing: bool = False


class ClassesSection(Section):
    """What only a class-conditional generator asks for (DerMAE)."""

    preset: Literal["budget", "dermae_dit_b", "dermae_unet"] = "budget"  # the network of a fit from nothing
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"  # of a fit from nothing
    classes: list[str] = []  # diagnoses to learn; empty: plan.diagnoses


class LoraSection(FitSection):
    """LoRA on a generator. alpha equals the rank: a loader that ignores metadata then still scales it right."""

    family: Literal["joint", "flux", "inpaint", "class_conditional"] = "joint"
    train_mode: Literal["lora", "full"] = "lora"  # full: every weight of the network, which then is a whole generator
    min_snr_gamma: Positive | None = None  # Min-SNR weighting of noise levels (Hang et al. 2023 use 5); null: none
    rank: Count = 16
    learning_rate: Positive = 3e-4
    caption_dropout: Share = 0.1  # the share of rows fitted without their caption or class, for guidance
    balance: list[Literal["diagnosis", "source"]] = []  # whose groups are shown equally often, the outermost first
    mask_weight: Annotated[float, Field(ge=0.0)] = 1.0  # lambda_m: the mask latents' share of the loss
    head_weight: Annotated[float, Field(ge=0.0)] = 0.1  # lambda_s: Dice and BCE of the mask head
    flux: FluxSection = FluxSection()
    joint: JointSection = JointSection()
    inpaint: InpaintSection = InpaintSection()
    class_conditional: ClassesSection = ClassesSection()

    @model_validator(mode="after")
    def _flux_is_a_lora_of_a_flow(self) -> LoraSection:
        problems = []
        if self.family in ("flux", "inpaint") and self.train_mode == "full":
            problems.append(f"train_mode must be lora for family {self.family}, got full")
        if self.family == "flux" and self.min_snr_gamma is not None:
            problems.append(
                "min_snr_gamma must be null for family flux, whose noise levels are drawn where they matter"
            )
        if self.family == "flux" and self.sharding == "sharded" and self.flux.base_dtype in ("nf4", "fp8"):
            problems.append(f"sharding must be replicated for flux.base_dtype {self.flux.base_dtype}, got sharded")
        _refuse(problems)
        return self


class GateFitSection(FitSection):
    """The gate's latent segmenter, fitted on phantoms."""

    steps: Count = 2000
    batch_size: Count = 32
    learning_rate: Positive = 1e-3
    phantoms: Count = 4096


class MaeSection(FitSection):
    """Masked pre-training of a timm ViT: MAE (He et al. 2022) or SimMIM (Xie et al. 2022, mask_ratio 0.6)."""

    objective: Literal["mae", "simmim"] = "mae"  # simmim reads neither norm_pix_loss nor the decoder
    encoder: str = "vit_tiny_patch16_224"
    image_size: Annotated[int, Field(ge=32)] = 64
    patch_size: Count = 8
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    norm_pix_loss: bool = True
    decoder_width: Count = 64
    decoder_depth: Count = 2
    include_samples: bool = True
    learning_rate: Positive = 1.5e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05


class DistillSection(FitSection):
    """Distillation of the fine-tuned MAE encoder, or of a teacher that is there, into a phone-size student."""

    student: str = "mobilenetv3_small_050"  # any timm model
    teacher: str | None = None  # weights of the run (finetune-...) or a directory; null: fitted from fit.mae's encoder
    targets: Literal["same_crop", "whole_image"] = "same_crop"  # whole_image: asked once for each image, and kept
    feature_weight: Annotated[float, Field(ge=0.0)] = 0.0  # of the error of the teacher's pooled features
    teacher_steps: Count = 100
    temperature: Positive = 4.0
    alpha: Share = 0.7  # share of the soft-target term
    learning_rate: Positive = 1e-3

    @model_validator(mode="after")
    def _features_are_of_the_crop(self) -> DistillSection:
        if self.feature_weight and self.targets == "whole_image":
            _refuse(["feature_weight must be 0 for the targets whole_image, of which only the answers are kept"])
        return self


class FinetuneSection(FitSection):
    """Fine-tuning of an MAE encoder to name the diagnosis. The shares are MAE's own for ViT-B (He et al. 2022)."""

    weights: str | None = None  # a timm checkpoint (.safetensors) of `model`; null: fit.mae's encoder
    model: str = "vit_base_patch16_224"  # read with `weights`
    image_size: Annotated[int, Field(ge=32)] = 224  # px, read with `weights`
    global_pool: Literal["avg", "token"] = "avg"  # token: the class token, which can overflow in half precision
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65  # a layer's learning rate over that of the next
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # of the last block, growing linearly from 0
    mixup: Annotated[float, Field(ge=0.0)] = 0.8  # alpha of its beta distribution; 0: none
    cutmix: Annotated[float, Field(ge=0.0)] = 1.0
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    balanced: bool = True  # every class is shown as often as the largest
    include_samples: bool = True
    learning_rate: Positive = 5e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    schedule: Literal["constant", "cosine"] = "cosine"


class FitsSection(Section):
    """One section per objective."""

    lora: LoraSection = LoraSection()
    gate: GateFitSection = GateFitSection()
    mae: MaeSection = MaeSection()
    distill: DistillSection = DistillSection()
    finetune: FinetuneSection = FinetuneSection()


class PlanSection(Section):
    """What to make: quotas over diagnosis and skin type, and how each sample is drawn."""

    # Over the cells; each class up to the corpus's largest (DerMAE); by the corpus's training images, or their root; by
    # how often a classifier misses a diagnosis; or as `cells` says.
    balance: Literal["equal", "largest", "square_root", "prevalence", "false_negative", "explicit"] = "equal"
    count: Count = 256  # of `largest` and `explicit` there is no choice, so it is not read
    cells: dict[str, Natural] = {}  # explicit: samples by cell, such as melanoma/V, or melanoma/V/hand with sites
    false_negative_rates: str | None = None  # a JSON file of rates by diagnosis, here or in the run (lab/NAME.json)
    max_ratio: Positive | None = None  # of synthetic to real in a cell; unsaid it is 3 but for equal and largest
    # What synthesize.weights hold, by which samples are told apart.
    generator: Literal["joint", "flux", "inpaint", "class_conditional"] = "joint"
    diagnoses: list[str] = ["nevus", "melanoma", "seborrheic_keratosis"]
    skin_types: list[str] = list(taxonomy.SKIN_TYPES)
    sites: list[str] = []  # also a quota each; a prompt of the extended bank names them
    lesion_sizes: list[str] = []  # small, medium-sized, large; likewise
    bank: Literal["minimal", "standard", "extended"] = "standard"  # how much a prompt says (factory/prompt_banks)
    size: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 128
    guidance: Annotated[float, Field(ge=1.0, le=30.0)] = 2.0
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    seed: Natural = 0
    audit_share: Share = 0.02  # carried to the end ungated, to measure what the gate's rejection biases
    audit_min: Natural = 16
    unit_rows: Count | None = None  # None: see stages/plan.py
    overgenerate: bool = False  # quotas are of accepted samples, and more are planned by each cell's acceptance
    acceptance: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65  # of a cell that nothing is known of; DiffAug's
    acceptance_from: str | None = None  # another run, whose samples say what the first round may expect
    min_acceptance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02  # a cell that is surely below is planned no more
    max_rounds: Count | None = 1  # of plan and synthesize; null: until the quotas are met
    max_samples: Count | None = None  # of all rounds together
    images_per_s: Positive | None = None  # of an actor, for the estimate where this run has measured none
    price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_goes_without_saying(cls, given: Any) -> Any:
        """DiffAug guides by 7.5, where nothing else is said; its gain ends at three synthetic images to a real one."""
        if isinstance(given, dict) and given.get("generator") == "inpaint":
            given = {"guidance": 7.5, **given}
        if isinstance(given, dict) and given.get("balance", "equal") not in ("equal", "largest"):
            given = {"max_ratio": 3.0, **given}
        return given

    @model_validator(mode="after")
    def _words_are_known(self) -> PlanSection:
        problems = []
        for field, words, vocabulary in (
            ("diagnoses", self.diagnoses, taxonomy.DIAGNOSES),
            ("skin_types", self.skin_types, taxonomy.SKIN_TYPES),
            ("sites", self.sites, taxonomy.SITES),
            ("lesion_sizes", self.lesion_sizes, taxonomy.LESION_SIZES),
        ):
            needed = field in ("diagnoses", "skin_types")
            if (needed and not words) or len(set(words)) != len(words):
                least = " and at least one" if needed else ""
                problems.append(f"{field} must name each word once{least}, got {words}")
            problems += [problem for word in words for problem in _unknown(word, vocabulary, field)]
        cells = len(self.diagnoses) * len(self.skin_types) * max(1, len(self.sites)) * max(1, len(self.lesion_sizes))
        if self.count < cells and self.balance == "equal":
            problems.append(f"count must give every cell at least one sample: {cells} cells, got count {self.count}")
        _refuse(problems + self._unaskable() + self._wrong_targets())
        return self

    def axes(self) -> dict[str, list[str]]:
        """What a cell is made of: the plan's columns, and the words of each."""
        named = {"diagnosis": self.diagnoses, "skin_type": self.skin_types}
        return named | {
            axis: words for axis, words in (("site", self.sites), ("lesion_size", self.lesion_sizes)) if words
        }

    def _unaskable(self) -> list[str]:
        """Sites and sizes that the generator cannot be asked for."""
        problems = []
        for field, words in (("sites", self.sites), ("lesion_sizes", self.lesion_sizes)):
            if words and (self.bank != "extended" or self.generator == "class_conditional"):
                problems.append(
                    f"{field} needs bank extended and a generator by text, which alone can be asked for it, got bank "
                    f"{self.bank} and generator {self.generator}"
                )
        if self.lesion_sizes and self.generator == "inpaint":
            problems.append("lesion_sizes must be empty for generator inpaint, whose planned mask is the lesion's size")
        return problems

    def _wrong_targets(self) -> list[str]:
        problems = []
        if (self.balance == "explicit") != bool(self.cells):
            problems.append(
                f"cells must be given exactly for balance explicit, got {len(self.cells)} for {self.balance}"
            )
        if (self.balance == "false_negative") != (self.false_negative_rates is not None):
            problems.append(
                f"false_negative_rates must name a JSON file exactly for balance false_negative, got "
                f"{self.false_negative_rates} for {self.balance}"
            )
        if self.cells and not any(self.cells.values()):
            problems.append("cells must ask for at least one sample, got none")
        return problems + [problem for cell in self.cells for problem in self._wrong_cell(cell)]

    def _wrong_cell(self, cell: str) -> list[str]:
        words, axes = cell.split("/"), self.axes()
        if len(words) != len(axes):
            return [f"cells must be named {'/'.join(axes)}, got {cell!r}"]
        known = {
            "diagnosis": taxonomy.DIAGNOSES, "skin_type": taxonomy.SKIN_TYPES, "site": taxonomy.SITES,
            "lesion_size": taxonomy.LESION_SIZES,
        }  # fmt: skip
        lists = {"diagnosis": "diagnoses", "skin_type": "skin_types", "site": "sites", "lesion_size": "lesion_sizes"}
        problems = []
        for word, (axis, listed) in zip(words, axes.items(), strict=True):
            if wrong := _unknown(word, known[axis], f"the {axis} of cells {cell!r}"):
                problems += wrong
            elif word not in listed:
                problems.append(f"cells must be of those in {lists[axis]}, got {cell!r}; add {word} there")
        return problems


def _unknown(word: str, vocabulary: tuple[str, ...], field: str) -> list[str]:
    """The sentence on a word that a vocabulary lacks, or none."""
    try:
        taxonomy.check(word, vocabulary, field)
    except ValueError as error:
        return [str(error)]
    return []


class BackgroundsSection(Section):
    """The normal skin that lesions are drawn into, found in the corpus (plan.generator inpaint)."""

    min_side: Annotated[int, Field(ge=8)] = 32  # px in the corpus; a square is scaled to plan.size
    margin: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05  # of the shorter side, kept from the outlined lesion


class GateSection(Section):
    """The gate's policy. Rules run in the order of the fields; the first that fails is the reason."""

    weights: str = "starter"
    min_area: Share = 0.004  # of the image; below it a mask is empty
    max_area: Share = 0.95
    min_iou: Share = 0.7  # DiffAug's theta
    min_solidity: Share = 0.6
    shift_tolerance: Share = (
        0.015  # of the side: a shift that is forgiven, so tiny lesions need less IoU; 0 forgives none
    )
    checkpoints: list[Share] = [0.7]  # shares of the calls after which the clean estimate is judged
    checkpoint_slack: Share = 0.25  # how far below min_iou an early estimate may be


class SynthesizeSection(Section):
    """How the plan is carried out."""

    weights: str = "starter"  # `starter`, or a diffusers directory
    adapter: str | None = None  # a name under RUN/weights, or a LoRA directory; None uses the newest fit, if any
    slots: Annotated[int, Field(ge=1, le=512)] = 16
    num_actors: Count | None = None  # None: from what the cluster has
    num_threads: Count = 1
    keep_rejected: Literal["none", "latents", "image"] = "none"
    solver: Literal["ddim", "dpm++2m"] = "ddim"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of network and text encoders; auto: bfloat16 on a GPU,
    # float32 on a CPU, where bfloat16 can be hundreds of times slower (a GPU older than Ampere wants float32 too)
    base_dtype: Literal["nf4", "fp8"] | None = None  # of FLUX.1's weights on a small card; null: dtype


class WorthSection(Section):
    """The worth experiment: classifier and U-Net on real, real repeated, real + synthetic."""

    seeds: Count = 3
    folds: Annotated[int, Field(ge=2)] = 3
    steps: Count = 120
    batch_size: Count = 32
    image_size: Annotated[int, Field(ge=32, multiple_of=8)] = 64  # the U-Net halves it three times
    classifier: str = "mobilenetv3_small_050"
    max_real: Count = 1000


class EvaluateSection(Section):
    gate_pairs: Count = 400  # pairs with planted faults that the gate is tried on
    caption_images: Count = 100  # images that captioners are compared on and raters review
    caption_seed: Natural = 0  # which images, and in which order a rater sees them and their captions
    worth: WorthSection = WorthSection()


class ReleaseSection(Section):
    """What leaves the house."""

    name: str = "dermafactory-set"
    shard_bytes: Count = 536_870_912
    allow: Literal["any", "commercial"] = "any"


class Recipe(Section):
    """A whole run."""

    corpus: CorpusSection = CorpusSection()
    caption: CaptionSection = CaptionSection()
    fit: FitsSection = FitsSection()
    backgrounds: BackgroundsSection = BackgroundsSection()
    plan: PlanSection = PlanSection()
    synthesize: SynthesizeSection = SynthesizeSection()
    gate: GateSection = GateSection()
    evaluate: EvaluateSection = EvaluateSection()
    release: ReleaseSection = ReleaseSection()


# The sections (dotted) that each table's content depends on, beside its parents and weights.
FINGERPRINTS: dict[str, tuple[str, ...]] = {
    "listing": (
        "corpus.sources",
        "corpus.phantoms",
        "corpus.labels",
        "corpus.allow_missing_images",
        "corpus.unit_rows",
    ),
    "intake": ("corpus.min_side", "corpus.scales", "corpus.frame", "corpus.max_pixels", "corpus.max_bytes"),
    "embeddings": (),
    "copies": ("corpus.min_likeness", "corpus.min_cosine"),
    "corpus": ("corpus.near_duplicates", "corpus.val_share", "corpus.test_share"),
    "captions": ("caption.captioner", "caption.masks", "caption.aspect", "caption.bank", "caption.label_in_prompt"),
    # Those of captions that a model wrote, beside the digests of its weights and prompts.
    "captions by a model": ("caption.answer", "caption.max_new_tokens", "caption.batch_size", "caption.reject"),
    "backgrounds": ("backgrounds",),
    "plan": ("plan",),
    "samples": ("synthesize.slots", "synthesize.num_threads", "synthesize.keep_rejected", "synthesize.solver", "gate"),
}


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a recipe: where it was written, the dotted field, and the rule with what was got."""

    where: str
    field: str
    rule: str


class RecipeError(ValueError):
    """Every mistake of a recipe in one message; `mistakes` holds them apart."""

    def __init__(self, name: str, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        width = max(len(mistake.where) for mistake in mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = [f"  {m.where:<{width}}  {m.field}: {m.rule}".replace("  : ", "  ") for m in mistakes]
        super().__init__("\n".join([f"{name} has {count}:", *lines]))


def load(source: str | Path | None = None, overrides: Iterable[str] = (), base: Recipe | None = None) -> Recipe:
    """The recipe of a name (`smoke`), a YAML file or, for None, `base` or the defaults, with `a.b=c` overrides on top.

    Raises RecipeError with every mistake at once.
    """
    from factory import recipe_yaml

    return recipe_yaml.load(source, overrides, base)


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe with every default filled in, as YAML that loads to the same recipe."""
    from factory import recipe_yaml

    return recipe_yaml.resolved_yaml(recipe)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors and for other programs."""
    return Recipe.model_json_schema()
