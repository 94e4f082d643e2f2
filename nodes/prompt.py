"""Prompts to CONDITIONING."""

import logging
import warnings

from comfy_api.latest import io
from server import PromptServer

from ..l2p_core.text import MAX_TOKENS


class L2PTextEncode(io.ComfyNode):
    """A prompt and a negative prompt → CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PTextEncode",
            display_name="L2P Text Encode (Prompt)",
            category="L2P",
            description=(
                "Encodes the prompt and the negative prompt. An empty negative prompt is encoded"
                " too, because L2P was trained with it. Zeroed conditioning does not replace it."
            ),
            search_aliases=["clip text encode", "prompt", "negative prompt", "conditioning"],
            inputs=[
                io.Clip.Input("clip", tooltip="Z-Image's text encoder, Qwen3-4B."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=(
                        f"The prompt. Up to {MAX_TOKENS} tokens with the template's 9, about 350"
                        " words; the rest is left out, with a note under the node."
                    ),
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to avoid; may be empty. It has no effect at guidance scale 1.",
                ),
            ],
            outputs=[io.Conditioning.Output("positive"), io.Conditioning.Output("negative")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, prompt: str, negative_prompt: str = "") -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "there is no text encoder: an L2P checkpoint holds none. Connect Load Z-Image Text"
                " Encoder"
            )
        prompt, notes = completed(clip, prompt)
        (positive, cut), (negative, cut_too) = (
            encode(clip, text) for text in (prompt, negative_prompt)
        )
        note(cls, *notes, cut, cut_too)
        return io.NodeOutput(positive, negative)


class L2PPromptList(io.ComfyNode):
    """Lines of text → a list of prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PPromptList",
            display_name="L2P Prompt List",
            category="L2P",
            description=(
                "Splits a text into prompts, one per line. All nodes after this one run once for"
                " each prompt."
            ),
            search_aliases=["batch of prompts", "prompt lines", "list", "for each"],
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One prompt per line. Empty lines are skipped.",
                )
            ],
            outputs=[io.String.Output("prompt", is_output_list=True)],
        )

    @classmethod
    def execute(cls, prompts: str) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("the list of prompts is empty; write at least one line")
        return io.NodeOutput(lines)


def completed(clip, prompt: str) -> tuple[str, list[str]]:
    """The prompt that is encoded, and what to say of it.

    The bundled model's prompts are completed, always with the same seed; others stay the same."""
    of_tokenizer = getattr(clip.tokenizer, "l2p_read_prompt", None)  # from Load Checkpoint
    read = getattr(clip, "l2p_read_prompt", of_tokenizer)
    if read is None:
        return prompt, []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        complete = read(prompt, 0)
    notes = [str(each.message) for each in said]
    if complete != prompt:
        notes.append(f"The bundled model reads: {complete}")
    return complete, notes


def encode(clip, prompt: str) -> tuple[list, str | None]:
    """CONDITIONING of one prompt, cut at as many tokens as the model was trained on, and what to
    say where it was cut."""
    tokens, cut = clip.tokenize(prompt), None
    for key, (row, *_) in tokens.items():
        if len(row) > MAX_TOKENS:
            cut = (
                f"the prompt takes {len(row)} tokens with its template, {MAX_TOKENS} are read: the"
                f" last {len(row) - MAX_TOKENS} are left out (it begins {prompt[:40]!r})"
            )
            tokens[key] = [row[:MAX_TOKENS]]
    return clip.encode_from_tokens_scheduled(tokens), cut


def note(node: type[io.ComfyNode], *texts: str | None, log: bool = True) -> None:
    """Say what is not None of the texts under the node on the canvas, and in the log."""
    texts = [text for text in texts if text]
    for text in texts if log else ():
        logging.warning(text)
    if texts and node.hidden and node.hidden.unique_id:
        PromptServer.instance.send_progress_text("\n".join(texts), node.hidden.unique_id)


NODES = [L2PTextEncode, L2PPromptList]
