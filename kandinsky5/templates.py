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
