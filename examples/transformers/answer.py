"""Ask a compiled model about an image. It needs transformers and compressed-tensors, not gracec."""

import argparse

from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("directory", help="written by gracec, or a format's folder inside it")
parser.add_argument("--image", required=True)
parser.add_argument("--prompt", required=True)
parser.add_argument("--max-new-tokens", type=int, default=32)
arguments = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(arguments.directory)
processor = AutoProcessor.from_pretrained(arguments.directory)
content = [{"type": "image"}, {"type": "text", "text": arguments.prompt}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
image = ImageOps.exif_transpose(Image.open(arguments.image))  # upright; as RGB by the processor
inputs = processor(text=text, images=image, return_tensors="pt").to(model.dtype)
tokens = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
