"""What the text encoder reads around a prompt.

The published texts are part of the checkpoints' input format and stand here to the letter, misspellings
included (github kandinskylab/kandinsky-5, MIT). ``image_edit`` cuts three tokens into the user's prompt: as
published.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a prompt.

    Attributes:
        text: with one ``{}`` where the prompt goes.
        crop_start: how many of the encoder's first positions are cut off its output.
    """

    text: str
    crop_start: int

    def fill(self, prompt: str) -> str:
        """The text with the prompt in its place; braces in the prompt mean nothing."""
        before, after = self.text.split("{}")
        return f"{before}{prompt}{after}"


PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    "video": PromptTemplate(
        text=(
            "<|im_start|>system\n"
            "You are a promt engineer. Describe the video in detail.\n"
            "Describe how the camera moves or shakes, describe the zoom and view angle, "
            "whether it follows the objects.\n"
            "Describe the location of the video, main characters or objects and their "
            "action.\n"
            "Describe the dynamism of the video and presented actions.\n"
            "Name the visual style of the video: whether it is a professional footage, "
            "user generated content, some kind of animation, video game or scren "
            "content.\n"
            "Describe the visual effects, postprocessing and transitions if they are "
            "presented in the video.\n"
            "Pay attention to the order of key actions shown in the scene.<|im_end|>\n"
            "<|im_start|>user\n"
            "{}<|im_end|>"
        ),
        crop_start=129,
    ),
    "image": PromptTemplate(
        text=(
            "<|im_start|>system\n"
            "You are a promt engineer. Describe the image by detailing the color, shape,"
            " size, texture, quantity, text, spatial relationships of the objects and "
            "background:<|im_end|>\n"
            "<|im_start|>user\n"
            "{}<|im_end|>"
        ),
        crop_start=41,
    ),
    "image_edit": PromptTemplate(
        text=(
            "<|im_start|>system\n"
            "You are a promt engineer. Based on the provided source image (first image) "
            "and target image (second image), create an interesting text prompt that can"
            " be used together with the source image to create the target "
            "image:<|im_end|>\n"
            "<|im_start|>user\n"
            "{}"
        ),
        crop_start=55,
    ),
    "demo": PromptTemplate(text="<|im_start|>{}<|im_end|>", crop_start=1),
}

EXPANSION_INSTRUCTIONS: dict[str, str] = {
    "t2v": (
        "You write prompts for a model that makes short videos. Turn the user's idea into one "
        "paragraph that describes a single continuous shot: subject and looks, place, light, "
        "what moves and in which order, how the camera moves, and the visual style. Keep "
        "everything the user asks for, add only what goes with it, and copy words that are to "
        "be seen in the picture exactly. Plain statements, at most 120 words, in English. "
        "Answer with the paragraph alone."
    ),
    "i2v": (
        "You write prompts for a model that brings a picture to life as a short video. The "
        "user's picture is its first frame. Say in one paragraph what is seen there in a few "
        "words, then what moves, how and in which order, and how the camera moves. Keep "
        "everything the user asks for and invent no new subjects. Plain statements, at most 120 "
        "words, in English. Answer with the paragraph alone."
    ),
    "t2i": (
        "You write prompts for a model that paints pictures. Turn the user's idea into one "
        "paragraph that describes the finished picture: subject and looks, how many, where they "
        "stand, background, light, colours, viewpoint and style. Keep everything the user asks "
        "for, add only what goes with it, and copy words that are to be written in the picture "
        "exactly. Plain statements, at most 120 words, in English. Answer with the paragraph "
        "alone."
    ),
    "i2i": (
        "You write instructions for a model that edits pictures. You see the user's picture and "
        "the change that is wanted. Say in at most 60 words what is changed, where it is in the "
        "picture and how it looks afterwards, and that everything else stays as it is. Keep "
        "everything the user asks for, and copy words that are to be written in the picture "
        "exactly. In English. Answer with the instruction alone."
    ),
}
"""Preset's mode → what Qwen is told before it rewrites a prompt. These are ours."""
