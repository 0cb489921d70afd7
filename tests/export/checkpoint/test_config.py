import copy
import json

import pytest
from support.goldens import GOLDEN
from support.refusals import one_line_error

from uhd_export.checkpoint.config import mask_levels, parse_config, read_config
from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.checkpoint.source import locate
from uhd_export.checkpoint.vision_tower import KNOWN_TOWERS
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import Separators
from uhd_export.runtime.settings import Sampling

TOWER = read_json(GOLDEN / "configs" / "clip.json")
MISSING = object()


def config(name="v2_mask7", **changes):
    value = read_json(GOLDEN / "configs" / f"{name}.json")
    for field, new in changes.items():
        if new is MISSING:
            value.pop(field, None)
        else:
            value[field] = new
    return value


@pytest.mark.parametrize(
    "name, release, kind, levels, layout",
    [
        ("first_mask7", "first", "hiwin", (1, 2, 4), "merged"),
        ("v2_mask7", "branch", "hiwin", (1, 2, 4), "flat"),
        ("v2_mask5", "branch", "hiwin", (1, 4), "flat"),
        ("v2_mask3", "branch", "hiwin", (1, 2), "flat"),
        ("v1", "branch", "v1", (1,), "flat"),
    ],
)
def test_every_release(name, release, kind, levels, layout):
    parsed = parse_config(config(name), TOWER)
    assert (parsed.release, parsed.projector.kind, parsed.layout) == (release, kind, layout)
    assert parsed.projector.levels == levels
    assert parsed.upscale_only == (release == "first")
    assert (parsed.vision.layers, parsed.vision.table, parsed.vision.heads) == (3, 24, 4)
    assert (parsed.language.kind, parsed.language.head_size, parsed.language.eos) == ("llama", 64, (2,))
    assert (parsed.projector.side, parsed.projector.heads) == (12, 2)
    assert (parsed.template, parsed.separators) == ("vicuna_v1", Separators(29892, 13))


@pytest.mark.parametrize("suffix, side", [("", 12), ("_64", 8), ("_256", 16)])
def test_query_counts(suffix, side):
    parsed = parse_config(config(mm_projector_type="adapt_spatial_resampler_v2" + suffix), TOWER)
    assert parsed.projector.side == side


V1 = {
    "first release": ("first_mask7", {"feature_mode": "uhd_v1"}, "first", 12),
    "branch LLaVA-UHD-v1": ("first_mask7", {"feature_mode": MISSING}, "branch", 12),
    "branch head": ("v1", {}, "branch", 12),
    "branch head, 64 queries": ("v1", {"mm_projector_type": "uhd_v1_query64"}, "branch", 8),
}


@pytest.mark.parametrize("name, changes, release, side", V1.values(), ids=V1)
def test_every_release_of_v1(name, changes, release, side):
    parsed = parse_config(config(name, **changes), TOWER)
    assert (parsed.projector.kind, parsed.projector.levels) == ("v1", (1,))
    assert (parsed.release, parsed.projector.side) == (release, side)


def test_qwen2():
    changes = {
        "model_type": "llava_qwen",
        "num_key_value_heads": 2,
        "rope_theta": MISSING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "eos_token_id": [3, 4],
        "bos_token_id": None,
    }
    language = parse_config(config(**changes), TOWER).language
    assert (language.kind, language.kv_heads, language.qkv_bias) == ("qwen2", 2, True)
    assert (language.rope_theta, language.tied, language.bos, language.eos) == (1e6, True, None, (3, 4))
    assert parse_config(config(**changes), TOWER).template == "qwen"


def test_overrides_and_defaults():
    parsed = parse_config(config(feature_scale_mask=MISSING), TOWER, layout="merged")
    assert (parsed.layout, parsed.projector.levels) == ("merged", (1, 2, 4))
    assert parse_config(config(), TOWER, mask=15).projector.levels == (1, 2, 4, 8)
    assert parse_config(config(mm_separator_token_ids=[7, 8]), TOWER).separators == Separators(7, 8)
    assert parse_config(config(), {"vision_config": TOWER}) == parse_config(config(), TOWER)


NULLABLE = (
    "hidden_act",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_hidden_size",
    "feature_scale_mask",
    "mm_separator_token_ids",
)


def test_null_means_the_default():
    assert parse_config(config(**dict.fromkeys(NULLABLE)), {**TOWER, "hidden_act": None}) == parse_config(
        config(**dict.fromkeys(NULLABLE, MISSING)), TOWER
    )


@pytest.mark.parametrize(
    "eos, generating, ids",
    [
        (2, None, (2,)),
        (2, {}, (2,)),
        (2, {"eos_token_id": [3, 2]}, (2, 3)),
        ([4, 2], {"eos_token_id": 5}, (4, 2, 5)),
        (MISSING, {"eos_token_id": 0}, (0,)),
        (None, {"eos_token_id": None}, (2,)),
    ],
)
def test_ids_that_end_a_text(eos, generating, ids):
    assert parse_config(config(eos_token_id=eos), TOWER, generating).language.eos == ids


def test_the_template_may_be_chosen(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(mm_hidden_size=1024)))
    assert read_config(tmp_path).template == "vicuna_v1"
    assert read_config(tmp_path, SourceOptions(template="qwen")).template == "qwen"
    with pytest.raises(UhdError, match="template 'alpaca': must be one of vicuna_v1, llava_v1, plain, qwen"):
        SourceOptions(template="alpaca")


def test_the_generation_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(mm_hidden_size=1024, eos_token_id=2)))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_config(tmp_path).language.eos == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UhdError, match="generation config field eos_token_id"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "generating, sampling",
    [
        (None, Sampling()),
        ({"temperature": 0.9, "top_p": 0.6}, Sampling()),
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),
        ({"do_sample": True, "temperature": 0.9, "top_p": 0.6}, Sampling(0.9, 50, 0.6)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
            Sampling(0.7, 20, 0.8, repetition_penalty=1.05),
        ),
        ({"do_sample": True, "min_p": 0.1}, Sampling(1.0, 50, 1.0, min_p=0.1)),
        ({"do_sample": False, "min_p": 0.1}, Sampling()),
        ({"repetition_penalty": 1.2, "do_sample": False}, Sampling(repetition_penalty=1.2)),
    ],
)
def test_the_generation_configs_sampling_is_the_default(generating, sampling):
    parsed = parse_config(config(), TOWER, generating)
    assert parsed.sampling == parsed.settings(ImageOptions()).sampling == sampling


@pytest.mark.parametrize(
    "generating",
    [
        {"do_sample": True, "top_p": 2},
        {"do_sample": True, "min_p": 2},
        {"repetition_penalty": 0},
        {"do_sample": "yes"},
        {"do_sample": True, "top_k": 1.5},
    ],
)
def test_wrong_sampling_is_named(generating):
    with pytest.raises(UhdError, match=f"generation config field {list(generating)[-1]}"):
        parse_config(config(), TOWER, generating)


def test_where_the_first_release_cuts_a_prompt():
    limits = {"first_mask7": 2048, "v2_mask7": None}
    for name, limit in limits.items():
        parsed = parse_config(config(name, tokenizer_model_max_length=2048), TOWER)
        assert parsed.prompt_limit == parsed.settings(ImageOptions()).prompt_limit == limit
    assert parse_config(config("first_mask7", tokenizer_model_max_length=None), TOWER).prompt_limit is None
    with pytest.raises(UhdError, match="config field tokenizer_model_max_length"):
        parse_config(config("first_mask7", tokenizer_model_max_length="long"), TOWER)


def test_qwen2_needs_an_id_that_ends_a_text():
    with pytest.raises(UhdError, match=r"config field eos_token_id: missing, in generation_config\.json too"):
        parse_config(config(model_type="qwen2", eos_token_id=None), TOWER)


def test_levels_of_masks():
    assert {mask: mask_levels(mask) for mask in (1, 3, 5, 7, 15)} == {
        1: (1,),
        3: (1, 2),
        5: (1, 4),
        7: (1, 2, 4),
        15: (1, 2, 4, 8),
    }


REQUIRED = (
    "mm_projector_type",
    "model_mode",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
TOWER_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


@pytest.mark.parametrize("value", [MISSING, None, [1], True, {}])
@pytest.mark.parametrize("field", REQUIRED)
def test_missing_or_mistyped_fields_are_named(field, value):
    with pytest.raises(UhdError, match=f"config field {field}: .*(missing|wrong type)"):
        parse_config(config(**{field: value}), TOWER)


@pytest.mark.parametrize("value", [MISSING, None, "24", 0, -1, 1.5])
@pytest.mark.parametrize("field", TOWER_REQUIRED)
def test_missing_or_mistyped_fields_of_the_tower_are_named(field, value):
    tower = {k: v for k, v in {**TOWER, field: value}.items() if v is not MISSING}
    with pytest.raises(UhdError, match=f"vision config field {field}: "):
        parse_config(config(), tower)


@pytest.mark.parametrize(
    "field, value",
    [
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_projector_type", "adapt_spatial_resampler_v2_100"),
        ("model_mode", "llava"),
        ("model_mode", ["uhd_v2"]),
        ("model_type", "llava_mistral"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_start_end", "true"),
        ("mm_use_im_patch_token", True),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("s2", True),
        ("mlp_bias", True),
        ("partial_rotary_factor", 0.5),
        ("tie_word_embeddings", "false"),
        ("rms_norm_eps", -1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_scaling", {"type": None, "factor": 2.0}),
        ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 24]}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_theta", 0),
        ("num_hidden_layers", 10**6),
        ("hidden_size", 1 << 40),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_theta", "1e4"),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("hidden_size", 192),
        ("vocab_size", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, "</s>"]),
        ("eos_token_id", -1),
        ("eos_token_id", 32000),
        ("eos_token_id", [2, 99999]),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_hidden_size", 1024),
        ("feature_scale_mask", 4),
        ("feature_scale_mask", 17),
        ("feature_scale_mask", "7"),
        ("feature_scale_mask", True),
        ("mm_separator_token_ids", [13]),
        ("mm_separator_token_ids", "13"),
        ("mm_separator_token_ids", [29892, 32000]),
    ],
)
def test_unsupported_values_are_named(field, value):
    with one_line_error(f"config field {field}: "):
        parse_config(config(**{field: value}), TOWER)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("patch_size", 16),
        ("image_size", 340),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 1),
        ("layer_norm_eps", "small"),
    ],
)
def test_unsupported_values_of_the_tower_are_named(field, value):
    with pytest.raises(UhdError, match=f"vision config field {field}: "):
        parse_config(config(), {**TOWER, field: value})


def test_two_bases_of_the_rotary_embedding_must_agree():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(UhdError, match="config field rope_theta: rope_theta and rope_parameters disagree"):
        parse_config(config(rope_theta=1e4, rope_parameters=rope), TOWER)
    assert parse_config(config(rope_theta=5e5, rope_parameters=rope), TOWER).language.rope_theta == 5e5


@pytest.mark.parametrize("changes", [{"feature_mode": "featup"}, {"mm_projector_type": "mlp2x_gelu"}])
def test_unsupported_first_release(changes):
    with pytest.raises(UhdError, match=f"config field {next(iter(changes))}: "):
        parse_config(config("first_mask7", **changes), TOWER)


def test_the_official_tower_needs_no_download(tmp_path):
    official = config(mm_hidden_size=1024)
    (tmp_path / "config.json").write_text(json.dumps(official))
    vision = read_config(tmp_path).vision
    assert (vision.hidden, vision.layers, vision.table) == (1024, 23, 24)
    assert official["mm_vision_tower"] in KNOWN_TOWERS


def test_tower_in_the_checkpoint_folder(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps(TOWER))
    (tmp_path / "config.json").write_text(json.dumps(config(mm_vision_tower="clip")))
    assert read_config(tmp_path).vision.hidden == 64


def test_a_folder_beside_the_user_is_not_the_checkpoints_tower(tmp_path, monkeypatch):
    for folder, width in ((tmp_path / "clip", 128), (tmp_path / "checkpoint" / "clip", 64)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**TOWER, "hidden_size": width}))
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "config.json").write_text(json.dumps(config(mm_vision_tower="clip", mm_hidden_size=None)))
    monkeypatch.chdir(tmp_path)
    assert read_config(checkpoint).vision.hidden == 64
    assert read_config(checkpoint, SourceOptions(vision_tower="clip")).vision.hidden == 128
    (checkpoint / "config.json").write_text(
        json.dumps(config(mm_vision_tower=str(tmp_path / "clip"), mm_hidden_size=None))
    )
    assert read_config(checkpoint).vision.hidden == 128


OFFICIAL_CLIP = "clip-vit-large-patch14-336"


CACHED = "models--openai--clip-vit-large-patch14-336"
TRAINING_PATHS = [
    OFFICIAL_CLIP,
    f"./pretrained_models/{OFFICIAL_CLIP}",
    f"./pretrained_models/{CACHED}",
    f"{CACHED}/",
    f"/home/x/.cache/huggingface/hub/{CACHED}/snapshots/ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    f"/home/x/hub/{CACHED}/snapshots/ce19dc912ca5cd21c8a653c79e251e808ccabcd1/",
    f"/home/x/{OFFICIAL_CLIP}/",
    f"/home/x/{OFFICIAL_CLIP}//",
    rf"C:\Users\x\models\{OFFICIAL_CLIP}",
    rf"..\hub\{CACHED}\snapshots\ce19dc91\\",
    f"openai/{OFFICIAL_CLIP}/",
]


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_the_official_tower_is_known_by_a_training_path(tmp_path, path):
    (tmp_path / "config.json").write_text(json.dumps(config(mm_vision_tower=path, mm_hidden_size=1024)))
    assert read_config(tmp_path).vision.layers == 23


def test_a_tower_that_the_user_names_must_be_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(mm_hidden_size=1024)))
    with pytest.raises(UhdError, match="no such folder"):
        read_config(tmp_path, SourceOptions(vision_tower="/home/x/" + OFFICIAL_CLIP))


def test_a_folder_of_the_hubs_cache_is_its_snapshot(tmp_path):
    snapshot = tmp_path / CACHED / "snapshots" / "ce19dc91"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(TOWER))
    for changes, tower in (({}, tmp_path / CACHED), ({"mm_vision_tower": CACHED}, None)):
        (tmp_path / "config.json").write_text(json.dumps(config(mm_hidden_size=None, **changes)))
        assert read_config(tmp_path, SourceOptions(vision_tower=tower)).vision.hidden == 64
    assert locate(tmp_path / CACHED) == snapshot
    (snapshot.parent / "other").mkdir()
    (snapshot.parent / "other" / "config.json").write_text("{}")
    with pytest.raises(UhdError, match="holds 2 snapshots; pass the folder of one of them"):
        locate(tmp_path / CACHED)


@pytest.mark.parametrize("path", ["/home/x/my-clip", "../my-clip", "my-clip", ["clip"]])
def test_a_tower_that_is_not_here_is_named_with_the_remedy(tmp_path, path):
    (tmp_path / "config.json").write_text(json.dumps(config(mm_vision_tower=path)))
    with one_line_error(r"config field mm_vision_tower: .*(; pass --vision-tower|wrong type)"):
        read_config(tmp_path)


def test_missing_tower_field_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(mm_vision_tower=MISSING)))
    with pytest.raises(UhdError, match="config field mm_vision_tower: missing; pass --vision-tower"):
        read_config(tmp_path)


@pytest.mark.parametrize("text, reason", [("{", "not readable as JSON"), ("[]", "must hold a JSON object")])
def test_broken_config_files_are_named(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UhdError, match=rf"config\.json: {reason}"):
        read_config(tmp_path)


def test_configs_are_not_changed_by_parsing():
    raw, tower = config(), copy.deepcopy(TOWER)
    parse_config(raw, tower)
    assert (raw, tower) == (config(), TOWER)
