"""The other side of track_test.py: what TensorBoard makes of a folder, as one line of JSON.

Run by a Python with tensorboard: `track_peer.py FOLDER`.
"""

import json
import sys

from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing import plugin_event_accumulator

# Everything, and not a sample of it.
WHOLE = {"scalars": 0, "images": 0, "tensors": 0}


def legacy(folder):
    """Returns what the accumulator of values shows."""
    found = event_accumulator.EventAccumulator(folder, size_guidance=WHOLE).Reload()
    tags = found.Tags()
    scalars = {tag: [[item.step, item.value] for item in found.Scalars(tag)]
               for tag in tags["scalars"]}
    images = {tag: [[item.step, item.width, item.height, item.encoded_image_string.hex()]
                    for item in found.Images(tag)] for tag in tags["images"]}
    return {"scalars": scalars, "images": images}


def of_plugins(folder):
    """Returns what the accumulator of today's plugins shows: tags to plugin and steps."""
    found = plugin_event_accumulator.EventAccumulator(
        folder, tensor_size_guidance=WHOLE).Reload()
    plugins = {tag: plugin for plugin in ("scalars", "images", "text")
               for tag in found.PluginTagToContent(plugin)}
    steps = {tag: [item.step for item in found.Tensors(tag)] for tag in plugins}
    texts = {tag: [item.tensor_proto.string_val[0].decode() for item in found.Tensors(tag)]
             for tag, plugin in plugins.items() if plugin == "text"}
    return {"plugins": plugins, "steps": steps, "texts": texts}


if __name__ == "__main__":
    print(json.dumps(legacy(sys.argv[1]) | of_plugins(sys.argv[1])))
