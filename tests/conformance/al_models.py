"""The tests that transformers runs on its own models, run on ours. run.py copies this beside its test modules."""

import unittest

import torch

import hf_al

from . import test_modeling_common
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

# its training tests leave out encoders, which it looks up in this table
test_modeling_common.MODEL_MAPPING_NAMES |= {
    model_type: classes[1].__name__ for model_type, classes in hf_al.MODEL_CLASSES.items()
}


class ModelTester:
    """Sizes, a config and a batch, under the names that the mixin expects."""

    batch_size, seq_length, vocab_size, num_labels = 7, 7, 99, 3
    hidden_size, num_attention_heads, num_hidden_layers = 32, 4, 2  # three blocks, of which the first is the embedding
    is_training = True

    def __init__(self, parent, model_type: str):
        self.parent, self.model_type = parent, model_type

    def get_config(self):
        heads = {"num_attention_heads": self.num_attention_heads} if self.model_type == "al_transformer" else {}
        return hf_al.MODEL_CLASSES[self.model_type][0](
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_blocks=1 + self.num_hidden_layers,
            target_size=16, num_labels=self.num_labels, **heads,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
        }


class Conformance(ModelTesterMixin):
    model_type: str
    common_properties = ("hidden_size", "num_hidden_layers")
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = ModelTester(self, self.model_type)
        self.config_tester = ConfigTester(
            self, config_class=hf_al.MODEL_CLASSES[self.model_type][0], hidden_size=32,
            common_properties=list(self.common_properties),
        )  # fmt: skip

    @property
    def all_model_classes(self):
        return hf_al.MODEL_CLASSES[self.model_type][1:]

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(inputs_dict)
        if return_labels and issubclass(model_class, hf_al.modeling.modeling_al.ALForSequenceClassification):
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs


class TransformerTest(Conformance, unittest.TestCase):
    model_type = "al_transformer"
    common_properties = (*Conformance.common_properties, "num_attention_heads")


class LstmTest(Conformance, unittest.TestCase):
    model_type = "al_lstm"
    has_attentions = False
