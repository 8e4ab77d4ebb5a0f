"""Tiny diffusers pipelines with random weights, saved as diffusers saves them, and their tokenizers."""

import io
import json
from pathlib import Path

import sentencepiece
import torch

PROMPTS = [
    "a red fox runs over the snow",
    "",
    "two steps to the left, then right",
    "the quick brown fox " * 200,
]


def sentencepiece_folder(folder: Path) -> Path:
    """spiece.model of a few words, with the special tokens of T5."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*PROMPTS[:3], "the quick brown fox jumps & runs <b>"] * 10),
        model_writer=model,
        model_type="unigram",
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=3,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def t5(kind: str, tokenizer, width: int) -> torch.nn.Module:
    import transformers

    config, model = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    }[kind]
    sizes = dict(d_model=width, d_kv=4, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return model(config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes)).eval()


def wan_vae(**changes) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    numbers = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.5, 1.0])
    return AutoencoderKLWan(
        **{**dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), **numbers, **changes}
    ).eval()


def wan22_vae() -> torch.nn.Module:
    """Of Wan2.2's TI2V but for the sizes: residual, 48 channels, 16 times smaller
    pictures by 2 x 2 pixels and three halvings.
    """
    numbers = dict(
        latents_mean=torch.linspace(-0.3, 0.3, 48).tolist(), latents_std=torch.linspace(0.5, 1.5, 48).tolist()
    )
    kind = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    return wan_vae(z_dim=48, decoder_base_dim=12, **numbers, **kind)


def kl_vae(**changes) -> torch.nn.Module:
    """SD3's settings but for the sizes: 4 x smaller pictures, 4 channels."""
    from diffusers import AutoencoderKL

    settings = dict(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return AutoencoderKL(**{**settings, **changes}).eval()


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part of the network shows in its output."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


def save_wan(folder: Path, ti2v: bool = False) -> Path:
    """WanPipeline, tokenizer as tokenizer.json, scheduler as published; `ti2v`: of
    Wan2.2's TI2V, which is published as this class.
    """
    import transformers
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(sentencepiece_folder(folder / "pieces"))
    vae, sizes = (
        wan22_vae() if ti2v else wan_vae(),
        dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=20, num_layers=2),
    )
    channels = vae.config.z_dim
    transformer = spread(
        WanTransformer3DModel(in_channels=channels, out_channels=channels, text_dim=16, **sizes)
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer, t5("umt5", tokenizer, 16), vae, scheduler, transformer, expand_timesteps=ti2v
    )
    pipeline.save_pretrained(folder / "wan")
    return folder / "wan"


def save_wan_i2v(folder: Path, with_clip: bool) -> Path:
    """WanImageToVideoPipeline: of Wan2.1 with a CLIP vision model 20 wide, of 257 tokens;
    of Wan2.2 (its first network) without.
    """
    import transformers
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel

    torch.manual_seed(2)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(sentencepiece_folder(folder / "pieces"))
    sizes = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=20, num_layers=2)
    image = dict(image_dim=20, added_kv_proj_dim=24) if with_clip else {}
    channels = 4 + 4 + 4  # latents to denoise, mask, latents of the first frame
    pipeline = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=t5("umt5", tokenizer, 16),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        if with_clip
        else None,
        image_encoder=spread(clip_vision()) if with_clip else None,
        transformer=spread(
            WanTransformer3DModel(in_channels=channels, out_channels=4, text_dim=16, **sizes, **image)
        ),
    )
    pipeline.save_pretrained(folder / "wan-i2v")
    return folder / "wan-i2v"


def clip_vision() -> torch.nn.Module:
    import transformers

    sizes = dict(
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=2,
    )
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).eval()


def clip_tokenizer():
    """One token for each byte, alone or at a word's end, and a few merges; 77 tokens."""
    import transformers

    letters = [chr(i) for i in range(33, 127)]
    merges = [("t", "h"), ("th", "e</w>"), ("f", "o"), ("fo", "x</w>"), ("r", "e"), ("re", "d</w>")]
    names = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return transformers.CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=merges, model_max_length=77
    )


def clip(tokenizer, width: int, pooled: int, eos: int) -> torch.nn.Module:
    """CLIPTextModelWithProjection, or the CLIPTextModel without, of which pooled is 0."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=pooled or width,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel)(config).eval()


def save_sd3(folder: Path, with_t5: bool = True) -> Path:
    """StableDiffusion3Pipeline: CLIPs 16 and 24 wide, text 48 wide, pooled text 20 + 28 = 48 wide."""
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(1)
    words = clip_tokenizer()
    pieces = transformers.T5TokenizerFast.from_pretrained(sentencepiece_folder(folder / "pieces"))
    sizes = dict(
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        sample_size=8,
        pos_embed_max_size=8,
    )
    kinds = dict(dual_attention_layers=(0,), qk_norm="rms_norm")  # as 3.5 medium
    transformer = SD3Transformer2DModel(
        in_channels=4, out_channels=4, joint_attention_dim=48, pooled_projection_dim=48, **sizes, **kinds
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=spread(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        # As in SD3's config: 2 is no longer the token, the highest id is taken
        text_encoder=clip(words, 16, 20, eos=2),
        tokenizer=words,
        text_encoder_2=clip(words, 24, 28, eos=words.eos_token_id),
        tokenizer_2=words,
        text_encoder_3=t5("t5", pieces, 48) if with_t5 else None,
        tokenizer_3=pieces if with_t5 else None,
    )
    pipeline.save_pretrained(folder / "sd3")
    return folder / "sd3"


def llama_tokenizer():
    """Llama 3's splitting and bytes, and a token for every word of HunyuanVideo's prompt
    template, whose start is the 95 tokens that are cut off.
    """
    import transformers
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"]
    begin = special[0]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"], *PROMPTS[:3]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
    )


def hunyuan_vae(**changes) -> torch.nn.Module:
    """Published settings but for the widths: 8 x smaller pictures, 4 x fewer frames, 4 channels."""
    from diffusers import AutoencoderKLHunyuanVideo

    sizes = dict(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return AutoencoderKLHunyuanVideo(**{**sizes, **changes}).eval()


def save_flux(folder: Path) -> Path:
    """FluxPipeline: T5 text 16 wide, CLIP's pooled text 20 wide, guidance embedded."""
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(4)
    words, pieces = (
        clip_tokenizer(),
        transformers.T5TokenizerFast.from_pretrained(sentencepiece_folder(folder / "pieces")),
    )
    sizes = dict(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        axes_dims_rope=(4, 4, 4),
    )
    transformer = FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=16, pooled_projection_dim=20, guidance_embeds=True, **sizes
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_vae(),
        text_encoder=clip(words, 20, 0, eos=words.eos_token_id),
        tokenizer=words,
        text_encoder_2=t5("t5", pieces, 16),
        tokenizer_2=pieces,
        transformer=spread(transformer),
    )
    pipeline.save_pretrained(folder / "flux")
    return folder / "flux"


def save_hunyuan(folder: Path) -> Path:
    """HunyuanVideoPipeline: Llama's text 16 wide, CLIP's pooled text 20 wide, guidance
    embedded, scheduler as published.
    """
    import transformers
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    torch.manual_seed(3)
    words, pieces = clip_tokenizer(), llama_tokenizer()
    sizes = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = dict(
        vocab_size=len(pieces),
        bos_token_id=pieces.bos_token_id,
        eos_token_id=pieces.eos_token_id,
        pad_token_id=pieces.pad_token_id,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=16,
        pooled_projection_dim=20,
        guidance_embeds=True,
        rope_axes_dim=(4, 4, 4),
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=spread(transformers.LlamaModel(transformers.LlamaConfig(**sizes, **ids)).eval()),
        tokenizer=pieces,
        transformer=spread(transformer),
        vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(words, 20, 0, eos=words.eos_token_id),
        tokenizer_2=words,
    )
    pipeline.save_pretrained(folder / "hunyuan")
    return folder / "hunyuan"


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
