# SPDX-License-Identifier: Apache-2.0
"""transformers' own model tests (ModelTesterMixin, and GenerationTesterMixin where it is at hand) on all families.

Those that compress prompts run once with plain inputs and once with prompts that are compressed.
"""

from __future__ import annotations

import copy
import unittest
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto import modeling_auto

from modeling_tests.common_mixins import transformers_mixins
from remamba_hf import (
    MemMambaConfig,
    MemMambaForCausalLM,
    MemMambaModel,
    ReMamba2Config,
    ReMamba2ForCausalLM,
    ReMamba2Model,
    ReMambaConfig,
    ReMambaForCausalLM,
    ReMambaModel,
)

pytestmark = pytest.mark.smoke
MIXINS = transformers_mixins.load()


# Large enough that a dozen tokens are compressed, and the same in every training step.
COMPRESSION = dict(
    **dict(compression_span=0.5, compression_ratio=0.5, train_compression_tail=0),
    **dict(train_compression_span=None, train_compression_ratio=None),
)


class TinyTester:
    """A tiny model and a ragged batch for it, in the form that the mixins ask for.

    Args:
        config_class: of the family.
        settings: what the family's configuration has of its own.
    """

    def __init__(self, config_class: type, settings: dict[str, Any]) -> None:
        self.config_class = config_class
        self.settings = settings
        self.batch_size = 5
        self.seq_length = 16
        self.is_training = True
        self.vocab_size = 99
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.state_size = 16

    def get_config(self) -> Any:
        return self.config_class(
            **self.settings,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=self.state_size,
            bos_token_id=self.vocab_size - 1,
            eos_token_id=self.vocab_size - 1,
            pad_token_id=self.vocab_size - 1,
        )

    def attention_mask(self) -> torch.Tensor:
        """Left-padded rows of unequal length; the first fills the batch."""
        pads = torch.arange(self.batch_size)[:, None]
        return (torch.arange(self.seq_length) >= pads).long()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        input_ids = torch.randint(0, self.vocab_size - 1, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": self.attention_mask()}


class CommonTests(MIXINS.model, MIXINS.generation):
    """What all runs share. A family sets `config_class` and `all_model_classes`."""

    config_class: ClassVar[type]
    family_settings: ClassVar[dict[str, Any]] = {}
    has_attentions = False
    _auto_names: ClassVar[list[Any]] = []

    @classmethod
    def setUpClass(cls) -> None:
        """The mixins look up in these tables which class takes labels; a registered class is not among them."""
        super().setUpClass()
        backbone, language_model = cls.all_model_classes
        for table, model in (
            (modeling_auto.MODEL_MAPPING_NAMES, backbone),
            (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, language_model),
        ):
            patcher = patch.dict(table, {cls.config_class.model_type: model.__name__})
            patcher.start()
            cls.addClassCleanup(patcher.stop)

    def setUp(self) -> None:
        self.model_tester = TinyTester(self.config_class, self.family_settings)

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(
        self,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Rows without pads: where rows are ragged, the hidden states returned are gathered from those computed."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {"input_ids": inputs["input_ids"]}

    def test_generation_mixin_is_a_direct_base(self) -> None:
        """transformers' generation tests look for it by name there, and not in what a base inherits."""
        assert "GenerationMixin" in str(self.all_model_classes[1].__bases__)

    def test_generation_tester_mixin_inheritance(self) -> None:
        if not MIXINS.has_generation:
            self.skipTest("source distributions lack GenerationTesterMixin: the tests of `generate` are this suite's own")
        super().test_generation_tester_mixin_inheritance()


class PlainTests(CommonTests):
    """Inputs without a known prompt: the model is a plain Mamba, whose compressor takes part in nothing."""

    test_all_params_have_gradient = False


class CompressedTests(CommonTests):
    """Rows whose prompt is the first three quarters, so that every forward of the language model has two stages."""

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = copy.deepcopy(super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels))
        if model_class is self.all_model_classes[1] and inputs.get("input_ids") is not None:
            rows, length = inputs["input_ids"].shape
            prompt_end = 3 * length // 4
            mask = inputs.get("attention_mask", torch.ones(rows, length, dtype=torch.long))
            inputs["prompt_lengths"] = mask[:, :prompt_end].sum(-1)
            if return_labels:
                inputs["labels"][:, :prompt_end] = -100
        return inputs

    def test_inputs_are_compressed(self) -> None:
        """Otherwise this class would repeat the plain one."""
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        language_model = self.all_model_classes[1]
        inputs = self._prepare_for_class(inputs_dict, language_model)
        positions = language_model(config).eval()(**inputs).compressed_positions
        assert (positions >= 0).any(dim=1).all()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The inherited check replays a block's latest call for all its calls; with two stages each block has two."""
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        language_model = self.all_model_classes[1]
        inputs = self._prepare_for_class(inputs_dict, language_model, return_labels=True)
        model = language_model(config).train()
        model(**inputs).loss.backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in expected.values())
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(**inputs).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")

    @unittest.skip("its labels cover the whole row, and labels inside a given prompt are refused; the plain run has it")
    def test_causal_lm_loss_honors_shift_labels(self) -> None: ...


class ReMamba:
    """The family on Mamba-1 that compresses, for the tests above."""

    config_class = ReMambaConfig
    all_model_classes = (ReMambaModel, ReMambaForCausalLM)
    family_settings: ClassVar[dict[str, Any]] = COMPRESSION

    def _get_conv_state_shape(self, batch_size: int, config: ReMambaConfig) -> tuple[int, int, int]:
        return (batch_size, config.intermediate_size, config.conv_kernel)

    def _get_recurrent_state_shape(self, batch_size: int, config: ReMambaConfig) -> tuple[int, int, int]:
        return (batch_size, config.intermediate_size, config.state_size)


class ReMamba2:
    """The family on Mamba-2; its heads share B and C in two groups."""

    config_class = ReMamba2Config
    all_model_classes = (ReMamba2Model, ReMamba2ForCausalLM)
    family_settings: ClassVar[dict[str, Any]] = dict(num_heads=8, head_dim=8, n_groups=2, chunk_size=8, **COMPRESSION)

    def _get_conv_state_shape(self, batch_size: int, config: ReMamba2Config) -> tuple[int, int, int]:
        return (batch_size, config.intermediate_size + 2 * config.n_groups * config.state_size, config.conv_kernel)

    def _get_recurrent_state_shape(self, batch_size: int, config: ReMamba2Config) -> tuple[int, int, int, int]:
        return (batch_size, config.num_heads, config.head_dim, config.state_size)


class MemMamba:
    """The family on Mamba-1 that takes notes: three chunks of a row can be read, and the second layer reads the first's."""

    config_class = MemMambaConfig
    all_model_classes = (MemMambaModel, MemMambaForCausalLM)
    family_settings: ClassVar[dict[str, Any]] = dict(
        note_size=8, note_heads=2, pool_size=6, chunk_size=4, cross_layer_period=1
    )

    def _get_conv_state_shape(self, batch_size: int, config: MemMambaConfig) -> tuple[int, int, int]:
        return (batch_size, config.intermediate_size, config.conv_kernel)

    def _get_recurrent_state_shape(self, batch_size: int, config: MemMambaConfig) -> tuple[int, int, int]:
        return (batch_size, config.intermediate_size, config.state_size)


class PlainReMambaTest(ReMamba, PlainTests, unittest.TestCase): ...


class CompressedReMambaTest(ReMamba, CompressedTests, unittest.TestCase): ...


class PlainReMamba2Test(ReMamba2, PlainTests, unittest.TestCase): ...


class CompressedReMamba2Test(ReMamba2, CompressedTests, unittest.TestCase): ...


class MemMambaTest(MemMamba, CommonTests, unittest.TestCase):
    def test_notes_are_read(self) -> None:
        """Otherwise the memory would take part in nothing."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        output = self.all_model_classes[1](config).eval()(**inputs, output_notes=True)
        for reads in output.note_reads:
            assert (reads[:-1] > 0).any(dim=1).all()


del CommonTests, PlainTests, CompressedTests
