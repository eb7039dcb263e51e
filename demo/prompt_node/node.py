"""Demo Prompt: a word that the demo model knows, as conditioning."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import prompts


class DemoPrompt(io.ComfyNode):
    """Turns one of the demo model's few prompts into what a text encoder would have made of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSADemoPrompt",
            display_name="Demo Prompt",
            category="conditioning",
            description="The prompts that the demo model of PSA for ComfyUI was trained on.",
            inputs=[
                io.Combo.Input(
                    "subject",
                    options=[*prompts.SUBJECTS, "nothing"],
                    tooltip="What the video shows. nothing: the empty prompt, for the sampler's negative input.",
                ),
                io.Boolean.Input("mirrored", default=False, tooltip="Left and right exchanged."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, subject: str, mirrored: bool) -> io.NodeOutput:
        if subject == "nothing":
            words = (prompts.EMPTY, prompts.EMPTY)
        else:
            words = (subject, prompts.MIRRORED if mirrored else prompts.EMPTY)
        return io.NodeOutput([[prompts.embed(words).unsqueeze(0), {}]])


class DemoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DemoPrompt]
