"""What each fit trains on, for how long, and what only its family asks for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from factory.sections.base import Count, Natural, Positive, Section, Share, refuse


class FitSection(Section):
    """What the train loop needs to know of any objective."""

    steps: Count = 200
    batch_size: Count = 16  # over all workers
    learning_rate: Positive = 1e-4
    warmup_steps: Natural = 20
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at zero
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999  # AdamW's, of squared gradients; beta1 is 0.9
    clip_norm: Positive | None = 1.0  # of all gradients together; null: they are not clipped
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; bfloat16 is for GPUs
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
        refuse(problems)
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
            refuse(["pipeline must be joint for the encoding pixel4, whose mask is decoded with the image"])
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
        refuse(problems)
        return self


class GateFitSection(FitSection):
    """The gate's latent segmenter, fitted on phantoms."""

    steps: Count = 2000
    batch_size: Count = 32
    learning_rate: Positive = 1e-3
    phantoms: Count = 4096
    views: Count = 2  # pictures of each, as other cameras and skins would give; 1: the phantom as it is
    estimator_pairs: Natural = 2400  # that the estimate of the true IoU is fitted on; 0: none is fitted


class MaeSection(FitSection):
    """Masked pre-training of a timm ViT: MAE (He et al. 2022) or SimMIM (Xie et al. 2022, mask_ratio 0.6)."""

    objective: Literal["mae", "simmim"] = "mae"  # simmim reads neither norm_pix_loss nor the decoder
    weights: str | None = None  # a checkpoint (.safetensors) to begin from, MAE's own or timm's; null: random weights
    # By the tag of a timm name (vit_base_patch16_224.mae) pixels are normalised as its weights want it.
    encoder: str = "vit_tiny_patch16_224"
    image_size: Annotated[int, Field(ge=32)] = 64
    patch_size: Count = 8
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    norm_pix_loss: bool = True
    decoder_width: Count = 64
    decoder_depth: Count = 2
    include_corpus: bool = True  # false: the arm of synthetic images alone
    include_samples: bool = True  # false: the arm of real images alone
    keep_gib: Annotated[float, Field(ge=0.0)] = 4.0  # of decoded rows in a worker's memory; more are streamed by part
    shuffle_rows: Count = 8192  # at least so many are shuffled among each other; two such windows are held, encoded
    probe_every: Natural = 0  # steps between probes of the frozen features on validation diagnoses; 0: never
    learning_rate: Positive = 1.5e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95  # MAE's own

    @model_validator(mode="after")
    def _learns_from_something(self) -> MaeSection:
        if not self.include_corpus and not self.include_samples:
            refuse(["include_corpus and include_samples must not both be false; a fit learns from one of them"])
        return self


Rare = Literal["refuse", "leave_out"]  # what becomes of a diagnosis with one training image, or with none but others


class DistillSection(FitSection):
    """Distillation of the fine-tuned MAE encoder, or of a teacher that is there, into a phone-size student."""

    student: str = "mobilenetv3_small_050"  # any timm model
    student_weights: str | None = None  # a timm checkpoint (.safetensors) of it to begin from; null: random weights
    teacher: str | None = None  # weights of the run (finetune-...) or a directory; null: fitted from fit.mae's encoder
    targets: Literal["same_crop", "whole_image"] = "same_crop"  # whole_image: asked once for each image, and kept
    feature_weight: Annotated[float, Field(ge=0.0)] = 0.0  # of the error of the teacher's pooled features
    teacher_steps: Count = 100
    rare: Rare = "refuse"
    temperature: Positive = 4.0
    alpha: Share = 0.7  # share of the soft-target term
    learning_rate: Positive = 1e-3

    @model_validator(mode="after")
    def _features_are_of_the_crop(self) -> DistillSection:
        problems = []
        if self.feature_weight and self.targets == "whole_image":
            problems.append("feature_weight must be 0 for the targets whole_image, of which only the answers are kept")
        if self.feature_weight and self.sharding == "sharded":
            problems.append("feature_weight must be 0 for sharding sharded, whose pieces are called whole")
        refuse(problems)
        return self


class FinetuneSection(FitSection):
    """Fine-tuning of an MAE encoder to name the diagnosis. The shares are MAE's own for ViT-B (He et al. 2022)."""

    weights: str | None = None  # a timm checkpoint (.safetensors) of `model`; null: fit.mae's encoder
    model: str = "vit_base_patch16_224"  # read with `weights`; its tag (.mae) says how pixels are normalised
    image_size: Annotated[int, Field(ge=32)] = 224  # px, read with `weights`
    global_pool: Literal["avg", "token"] = "avg"  # token: the class token, which can overflow in half precision
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65  # a layer's learning rate over that of the next
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1  # of the last block, growing linearly from 0
    mixup: Annotated[float, Field(ge=0.0)] = 0.8  # alpha of its beta distribution; 0: none
    cutmix: Annotated[float, Field(ge=0.0)] = 1.0
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    balanced: bool = True  # every class is shown as often as the largest
    include_samples: bool = True
    rare: Rare = "refuse"
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
