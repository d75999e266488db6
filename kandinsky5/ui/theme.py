"""How the studio looks: K1's colours on gradio's plainest theme, with the system's own fonts."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

HERE = Path(__file__).resolve().parent
STYLE_FILE = HERE / "style.css"
SCRIPT_FILES = (HERE / "page.js", HERE / "preview.js", HERE / "queue.js")

_SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Cantarell"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono"]

VERMILION = gr.themes.Color(
    name="vermilion",
    c50="#fdf3f0",
    c100="#fbe3dc",
    c200="#f6c5b8",
    c300="#ef9d88",
    c400="#e77456",
    c500="#dc5333",
    c600="#c43f20",
    c700="#a3331a",
    c800="#842c1a",
    c900="#6d2819",
    c950="#3b120a",
)


def studio_theme() -> gr.themes.Base:
    """The theme; its fonts are names of installed ones, so nothing is fetched for them."""
    theme = gr.themes.Base(
        primary_hue=VERMILION,
        secondary_hue=gr.themes.colors.stone,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=[*map(gr.themes.Font, _SANS), gr.themes.Font("sans-serif")],
        font_mono=[*map(gr.themes.Font, _MONO), gr.themes.Font("monospace")],
    )
    return theme.set(
        body_background_fill="#f7f5f2",
        body_background_fill_dark="#151312",
        body_text_color="#1d1a18",
        body_text_color_dark="#ece7e2",
        body_text_color_subdued="#6b635c",
        body_text_color_subdued_dark="#a69d95",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1e1b19",
        background_fill_secondary="#faf8f6",
        background_fill_secondary_dark="#1a1716",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="550",
        block_title_text_size="13px",
        block_title_text_color="#4b443f",
        block_title_text_color_dark="#c9c0b8",
        block_info_text_size="12px",
        border_color_primary="#e4dfd9",
        border_color_primary_dark="#37322e",
        border_color_accent="#dc5333",
        input_background_fill="#ffffff",
        input_background_fill_dark="#262220",
        input_border_color="#ddd6cf",
        input_border_color_dark="#3d3733",
        input_border_color_focus="#dc5333",
        input_border_color_focus_dark="#e77456",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_radius="9px",
        input_shadow_focus="0 0 0 3px rgba(220, 83, 51, .18)",
        input_shadow_focus_dark="0 0 0 3px rgba(231, 116, 86, .25)",
        button_primary_background_fill="#c43f20",
        button_primary_background_fill_hover="#a3331a",
        button_primary_background_fill_dark="#c43f20",
        button_primary_background_fill_hover_dark="#dc5333",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f3efea",
        button_secondary_background_fill_dark="#2a2623",
        button_secondary_background_fill_hover_dark="#36312d",
        button_secondary_border_color="#ddd6cf",
        button_secondary_border_color_dark="#3d3733",
        button_border_width="1px",
        button_large_radius="10px",
        button_medium_radius="9px",
        layout_gap="14px",
    )
