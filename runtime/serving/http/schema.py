"""What the API takes and gives, as OpenAI's chat completions name it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

_Text = Annotated[str, StringConstraints(max_length=1 << 18)]


class _Strict(BaseModel):
    """An unknown field is refused: it may be a misspelt one that would change the answer."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    """`url` is a data URI, or an https address where the server allows them; `detail` changes nothing."""

    url: Annotated[str, StringConstraints(min_length=1)]
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: _Text


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    """What one side said; `name` changes nothing."""

    role: Literal["system", "user", "assistant"]
    content: _Text | list[Part]
    name: str | None = None
    # The official client sends an answer on with all of its fields: `parsed` is the content once more, in the
    # others nothing is.
    parsed: Any = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class JsonSchema(_Strict):
    """`schema` is a JSON schema; it is always followed, so `strict` changes nothing."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Strict):
    """An answer of any form."""

    type: Literal["text"]


class JsonFormat(_Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class SchemaFormat(_Strict):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(_Strict):
    """`include_usage` sends the usage before the end of the stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """The body of /v1/chat/completions. What is left out of the sampling is as the bundle says."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    n: Literal[1] | None = 1
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    # Of OpenAI's service, without an effect here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None


class PlanRequest(_Strict):
    """The body of /v1/plan: an image, or its size."""

    image_url: ImageUrl | None = None
    width: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    height: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class PlanAnswer(BaseModel):
    """How an image is cut: boxes are [left, top, right, bottom] in shares of its width and height."""

    width: int
    height: int
    slice_grid: tuple[int, int] | None
    slice_size: tuple[int, int] | None
    overview_size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    crops: int
    visual_tokens: int


class TokenizeRequest(_Strict):
    """The body of /v1/tokenize."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]


class TokenizeAnswer(BaseModel):
    """Token ids of the prompt, -200 where an image goes; `positions` with the images in place."""

    ids: list[int]
    positions: int
    context: int


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ProblemAnswer(BaseModel):
    """The body of every answer with a status from 400 on."""

    error: Problem
