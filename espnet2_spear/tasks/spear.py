"""SPEAR pre-training as an ESPnet2 task."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from espnet2.tasks.abs_task import AbsTask
from espnet2.train.class_choices import ClassChoices
from espnet2.train.trainer import Trainer
from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import str2bool, str_or_none

from espnet2_spear.codes.facts import check_codes_facts
from espnet2_spear.codes.targets import teacher_codes
from espnet2_spear.data.build import (
    add_sampling_arguments,
    build_iter_factory,
    check_sampling_options,
    register_data_types,
)
from espnet2_spear.data.dataset import SpearPreprocessor
from espnet2_spear.data.iter_factory import SpearIterFactory
from espnet2_spear.data.noise import NoiseList, SpearCollateFn
from espnet2_spear.hub.infer import check_fits
from espnet2_spear.spear.masking import SpanMasker
from espnet2_spear.spear.mixing import PRESETS as MIXING_PRESETS
from espnet2_spear.spear.mixing import Mixer, MixerConfig
from espnet2_spear.spear.model import SpearPretrainModel
from espnet2_spear.spear.objective import DEFAULT_PRESET, resolve_loss_weights
from espnet2_spear.spear.objective import PRESETS as LOSS_PRESETS
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.tasks.training_checks import check_model, one_kind_of_error
from espnet2_spear.train.gradients import scale_loss_by_weight
from espnet2_spear.train.interruption import forward_signals_to_ranks
from espnet2_spear.train.options import check_deepspeed_config
from espnet2_spear.train.ranks import destroy_process_group_on_exit, watch_ranks
from espnet2_spear.train.trainer import SpearTrainer
from espnet2_spear.zipformer.config import ZipformerConfig
from espnet2_spear.zipformer.fusion import fuse_chains

model_choices = ClassChoices(
    "model",
    classes={"spear": SpearPretrainModel},
    type_check=SpearPretrainModel,
    default="spear",
)


register_data_types()


class SpearTask(AbsTask):
    """Masked prediction of teacher codes.

    Data names: ``speech`` (sound), ``domain`` (text, one word) and
    ``codes_<teacher>`` (kaldi_ark or codes_store) for every teacher of ``--teachers``.
    """

    num_optimizers: int = 1
    class_choices_list = [model_choices]
    trainer = SpearTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of this task."""
        group = parser.add_argument_group("Task related")
        required = parser.get_default("required")
        required += ["teachers"]
        parser.set_defaults(unused_parameters=True)  # see Training._wrap_for_ranks
        group.add_argument(
            "--student",
            type=str,
            default="base",
            help="Named size of the student: base, large, xlarge, mini or tiny",
        )
        group.add_argument(
            "--student_conf",
            action=NestedDictAction,
            default=dict(),
            help="Fields of ZipformerConfig that differ from the named size",
        )
        group.add_argument(
            "--teachers",
            action=NestedDictAction,
            default=None,
            help="Teacher name -> {num_codebooks, codebook_size, frame_rate, "
            "quantizer: its identity, by default as the codes say, layer: of the "
            "student (from 1, at 50 Hz) that predicts them, by default its output}",
        )
        group.add_argument(
            "--domains",
            type=str,
            nargs="+",
            default=["speech", "audio"],
            help="Names that utt2domain may hold",
        )
        group.add_argument(
            "--loss_weights",
            action=NestedDictAction,
            default=None,
            help="Domain -> teacher -> weight of its loss; absent pairs weigh 0. Or "
            f"{{preset: one of {', '.join(LOSS_PRESETS)}}}, in YAML also the bare "
            f"name; by default {DEFAULT_PRESET}",
        )
        group.add_argument(
            "--masker_conf",
            action=NestedDictAction,
            default=dict(),
            help="Fields of SpanMasker",
        )
        group.add_argument(
            "--mixer_conf",
            action=NestedDictAction,
            default=dict(),
            help=f"Augmentation: {{preset: one of {', '.join(MIXING_PRESETS)}, "
            "rules: {domain: fields of MixingRule}, mixed_teachers: names}; by default "
            "none",
        )
        group.add_argument(
            "--noise_scp",
            type=str_or_none,
            default=None,
            help="wav.scp of noise recordings for --mixer_conf",
        )
        group.add_argument(
            "--noise_conf",
            action=NestedDictAction,
            default=dict(),
            help="{clips: noise clips a batch, max_seconds: longest piece of a "
            "recording}",
        )
        group.add_argument(
            "--compile",
            type=str2bool,
            default=False,
            help="Compile the student's element-wise operations by torch.compile",
        )
        add_sampling_arguments(group)
        for class_choices in cls.class_choices_list:
            class_choices.add_arguments(group)

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool) -> SpearCollateFn:
        """Padding; in training also noise, if it is mixed in.

        Raises:
            ValueError: noise is needed, and no usable list of it is given; or one is
                given, and nothing mixes it in.
        """
        config = build_mixer_config(args)
        if not train:
            return SpearCollateFn()
        if config is None or not config.needs_noise:
            if args.noise_scp or args.noise_conf:
                raise ValueError(
                    "noise_scp or noise_conf is given, and no rule of mixer_conf mixes "
                    "noise in: give one, such as mixer_conf: {preset: noise}, or set "
                    "noise_scp: null and noise_conf: {}"
                )
            return SpearCollateFn()
        if not args.noise_scp:
            raise ValueError(
                "mixer_conf mixes noise in: give --noise_scp, a wav.scp of noise "
                "recordings, or set noise_prob: 0 in mixer_conf.rules.<domain>"
            )
        if args.multiple_iterator:
            raise ValueError(
                "multiple_iterator: its parts would get the same noise in every epoch; "
                "leave it out, or mix no noise in"
            )
        conf = {"max_seconds": 40.0, "clips": 8} | args.noise_conf
        noise = NoiseList(args.noise_scp, conf.pop("max_seconds"))
        try:
            return SpearCollateFn(noise, seed=args.seed, **conf)
        except TypeError as error:
            raise ValueError(f"noise_conf: {error}") from None

    @classmethod
    def build_preprocess_fn(
        cls, args: argparse.Namespace, train: bool
    ) -> SpearPreprocessor:
        """Return the per-utterance checks."""
        return SpearPreprocessor(teacher_codes(args.teachers), args.domains)

    @classmethod
    def required_data_names(
        cls, train: bool = True, inference: bool = False
    ) -> tuple[str, ...]:
        """Inputs that must be there; codes are checked against ``--teachers``."""
        return ("speech",) if inference else ("speech", "domain")

    @classmethod
    def optional_data_names(
        cls, train: bool = True, inference: bool = False
    ) -> tuple[str, ...]:
        """No fixed ones: see check_task_requirements."""
        return ()

    @classmethod
    def check_task_requirements(
        cls, dataset, allow_variable_data_keys: bool, train: bool, inference=False
    ) -> None:
        """Accept ``codes_<anything>`` besides the required names.

        ESPnet lists optional names per class, while the teachers of a SPEAR run are
        named by its configuration.
        """
        required = cls.required_data_names(train, inference)
        known = (n in required or n.startswith("codes_") for n in dataset.names())
        allowed = allow_variable_data_keys or all(known)
        super().check_task_requirements(dataset, allowed, train, inference)

    @classmethod
    def build_task_iter_factory(
        cls, args: argparse.Namespace, iter_options, mode: str
    ) -> SpearIterFactory:
        """Mix corpora and domains by weight, for ``iterator_type: task``."""
        mixing = build_mixer_config(args)
        extension = 0.0 if mixing is None else mixing.max_extension
        return build_iter_factory(args, iter_options, mode, extension)

    @classmethod
    def main(
        cls,
        args: argparse.Namespace | None = None,
        cmd: Sequence[str] | None = None,
    ) -> None:
        """Run the task; signals reach the ranks that it starts."""
        with forward_signals_to_ranks():
            super().main(args=args, cmd=cmd)

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        """Train as every task does, after a check that the codes are the teachers'."""
        check_sampling_options(args)
        check_codes_facts(args)
        if args.use_deepspeed and args.distributed:
            check_deepspeed_config(args.deepspeed_config)
            # ESPnet exchanges its own trainer only.
            cls.trainer = Trainer
        with destroy_process_group_on_exit(), watch_ranks(args):
            super().main_worker(args)

    @classmethod
    def check_options(cls, args: argparse.Namespace, files: bool = True) -> None:
        """Build all that a training builds of its options, but for data and numbers.

        So a recipe finds out what the training would refuse before it makes data and
        codes for days: options that do not fit together, and files that are missing.

        Args:
            args: of the command line; not changed.
            files: whether noise and weights have to be there by now.

        Raises:
            ValueError: the training would refuse them; says why.
        """
        args = copy.deepcopy(args)
        args.compile = False
        with one_kind_of_error():
            check_sampling_options(args)
            if args.use_deepspeed:
                check_deepspeed_config(args.deepspeed_config)
            cls.trainer.build_options(args)
            noise = args.noise_scp
            for train in (True, False):
                cls.build_preprocess_fn(args, train)
                if train and noise and not (files or Path(noise).is_file()):
                    continue
                # Lists name recordings, which may be missing.
                cls.build_collate_fn(args, train).draw_noise(["check"])
        check_model(cls, args, files)

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> SpearPretrainModel:
        """Build the student with its heads from the configuration.

        Raises:
            ValueError: the configuration does not fit together.
        """
        # Trained attention weights and their gradients reach denormal numbers, which
        # slow a CPU down; threads that start later inherit the setting.
        torch.set_flush_denormal(True)
        # getattr: models of older experiments are built from their own options.
        fuse_chains(getattr(args, "compile", False))
        config = ZipformerConfig.from_dict({"name": args.student, **args.student_conf})
        # Written out, so that config.yaml describes the training by itself.
        args.student_conf = config.to_dict()
        try:
            masker = SpanMasker(**args.masker_conf)
        except (TypeError, ValueError) as error:
            raise ValueError(f"masker_conf: {error}") from None
        args.loss_weights = resolve_loss_weights(
            args.loss_weights or DEFAULT_PRESET, args.domains, list(args.teachers)
        )
        teachers = teacher_codes(args.teachers)
        mixing = build_mixer_config(args)
        student = SpearEncoder(config)
        model = model_choices.get_class(args.model)(
            student=student,
            teachers=teachers,
            domains=args.domains,
            loss_weights=args.loss_weights,
            masker=masker,
            mixer=mixing and Mixer(mixing, args.domains, teachers),
            **args.model_conf,
        )
        # Outside the student, whose tensors stay those of released checkpoints.
        model.schedule = student.batch_count_state()
        # Weights of --init_param are trained; layers are not skipped as at first.
        student.register_load_state_dict_pre_hook(_note_loading)
        options = vars(args)
        if options.get("use_deepspeed") and options.get("distributed"):
            scale_loss_by_weight(model)
        return model


def _note_loading(
    student: SpearEncoder,
    state_dict: dict,
    prefix: str,
    metadata: object,
    strict: bool,
    *unused: object,
) -> None:
    if strict:
        remedy = "set both as the config.yaml of these weights has them"
        check_fits(student, state_dict, prefix, "student, student_conf", remedy)
    key = prefix.removesuffix("student.") + "schedule.batches"
    student.end_schedules_of_loaded(state_dict, prefix, key)


def build_mixer_config(args: argparse.Namespace) -> MixerConfig | None:
    """Turn the option ``--mixer_conf`` into an object; None: no augmentation.

    Raises:
        ValueError: see :meth:`MixerConfig.from_dict`.
    """
    conf = getattr(args, "mixer_conf", {})  # absent in older experiments
    return MixerConfig.from_dict(conf, args.domains, list(args.teachers))
