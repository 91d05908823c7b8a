"""A model without weights is built as the real one and takes no memory."""

import torch
from transformers import LlavaForConditionalGeneration

from gracec.capture import capture
from gracec.models.skeleton import skeleton, stand_in, without_weights
from gracec.models.surgery import own_tensors


def test_a_stand_in_takes_the_memory_of_one_number() -> None:
    made = stand_in(torch.Size((1000, 1000)), torch.bfloat16)
    assert made.shape == (1000, 1000) and made.untyped_storage().nbytes() == 2
    assert not made.requires_grad


def test_a_skeleton_has_shapes_names_ties_and_buffers(
    llava: LlavaForConditionalGeneration,
) -> None:
    for built in (skeleton(llava.config, torch.float32), without_weights(llava)):
        expected, found = llava.state_dict(), built.state_dict()
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        assert built.get_output_embeddings().weight is built.get_input_embeddings().weight
        for name, buffer in llava.named_buffers():
            assert torch.equal(built.get_buffer(name), buffer), name
        assert not built.training
        assert capture(built).fqns.keys() == capture(llava).fqns.keys()


def test_a_skeleton_leaves_the_configuration_as_it_is(llava: LlavaForConditionalGeneration) -> None:
    before = llava.config.to_json_string()
    assert skeleton(llava.config, torch.bfloat16).dtype == torch.bfloat16
    assert llava.config.to_json_string() == before


def test_own_tensors_are_copies_that_stay_tied(llava: LlavaForConditionalGeneration) -> None:
    copied, copies = own_tensors(llava)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    for name, parameter in llava.named_parameters():
        own = copied.get_parameter(name)
        assert own is copies[id(parameter)]
        assert torch.equal(own, parameter) and own.data_ptr() != parameter.data_ptr()
