"""Clips: folders of frames, lists of frames, arrays of bytes; the order in which a model takes them."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import rsm_probe
from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.sources import LoadedModel, as_images, load_model
from rsm_probe.sources.images.published import resized
from rsm_probe.studies.registry import read_study

# Five clips of twelve frames.
BYTES = np.random.default_rng(0).integers(0, 256, (5, 12, 8, 8, 3), dtype=np.uint8)
NAMES = ["jump/clip1", "jump/clip2", "jump/clip10", "run/clip1", "run/clip2"]
LABELS = ["jump", "jump", "jump", "run", "run"]
# Of twelve frames, four.
TAKEN = [0, 3, 7, 11]
CLIPS = torch.from_numpy(BYTES[:, TAKEN]).float() / 255
COLOURS_FIRST, FRAMES_FIRST = CLIPS.permute(0, 4, 1, 2, 3), CLIPS.permute(0, 1, 4, 2, 3)
PICTURES = [[Image.fromarray(frame) for frame in clip] for clip in BYTES]


@pytest.fixture
def clips(tmp_path):
    for name, frames in zip(NAMES, PICTURES, strict=True):
        folder = tmp_path / "clips" / name
        folder.mkdir(parents=True)
        for k, frame in enumerate(frames):
            frame.save(folder / f"frame{k}.png")
    return tmp_path / "clips"


class Video(nn.Sequential):
    def __init__(self, frames_first=False):
        super().__init__(nn.Conv3d(3, 4, 2))
        self.frames_first = frames_first

    def forward(self, x):
        return super().forward(x.transpose(1, 2) if self.frames_first else x)


def tokens(model, images, layer="0"):
    layers = rsm_probe.capture(model, images, layer, f"memory://{id(model)}{id(images)}")
    return layers[layer].tokens(), layers.labels


def expected(model, batch):
    with torch.no_grad():
        return model(batch).flatten(2).mT


@pytest.mark.filterwarnings("ignore:no preprocessing given")
class TestModels:
    @pytest.mark.parametrize(("axes", "first"), [(None, False), ("NCTHW", False), ("ntchw", True)])
    def test_frames_are_sampled_in_the_order_that_people_count(self, clips, axes, first):
        images = as_images(clips, clips=4, axes=axes)
        assert (images.ids, images.labels) == (NAMES, LABELS)
        model = Video(first)
        read, labels = tokens(model, images)
        assert torch.equal(read, expected(model, FRAMES_FIRST if first else COLOURS_FIRST))
        assert labels == LABELS

    def test_models_of_transformers_get_frames_first(self, clips):
        model = transformers.VideoMAEModel(
            transformers.VideoMAEConfig(
                image_size=8, patch_size=4, num_frames=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=8,
            )
        ).eval()  # fmt: skip
        wrapped = nn.Sequential()
        wrapped.add_module("inner", model)
        with torch.no_grad():
            (last,) = model(FRAMES_FIRST, return_dict=False)[:1]
        for module, layer in ((model, "encoder.layer.0"), (wrapped, "inner.encoder.layer.0")):
            read, _ = tokens(module, as_images(clips, clips=4), layer)
            torch.testing.assert_close(model.layernorm(read) if model.layernorm else read, last, atol=1e-6, rtol=1e-6)
        both = rsm_probe.sweep(
            {"a": model, "b": Video()}, as_images(clips, clips=4), {"a": "encoder.layer.0", "b": "0"}, ["identity"]
        )
        assert both.cka.shape == (2, 2)
        said = r"to take clips or volumes: of a folder of clips.*clips=16.*YAML clips: 16"
        with pytest.raises(ImageError, match=said):
            tokens(model, clips, "encoder.layer.0")
        with pytest.raises(ImageError, match=r"shape \(5, 3, 4, 8, 8\): .* transformers \(N, T, C, H, W\).*axes="):
            tokens(model, as_images(clips, clips=4, axes="NCTHW"), "encoder.layer.0")

    def test_frames_read_as_single_pictures_by_a_video_model_are_answered_with_clips(self, clips):
        with pytest.raises(ImageError, match=r"fails on images of shape .*as_images\(folder, clips=16\)"):
            tokens(Video(), clips)
        with pytest.raises(ImageError, match=r"NTCHW"):
            tokens(Video(), as_images(clips, clips=4, axes="NTCHW"))

    def test_as_many_frames_as_colours_show_no_order(self, clips):
        with pytest.raises(ImageError, match=r"clips of 3 frames with 3 channels .*axes='NCTHW' or axes='NTCHW'"):
            tokens(Video(), as_images(clips, clips=3))
        for axes in ("NCTHW", "NTCHW"):
            model = Video(axes == "NTCHW")
            read, _ = tokens(model, as_images(clips, clips=3, axes=axes))
            batch = torch.from_numpy(BYTES[:, [0, 5, 11]]).float() / 255
            order = (0, 1, 4, 2, 3) if axes == "NTCHW" else (0, 4, 1, 2, 3)
            assert torch.equal(read, expected(model, batch.permute(order)))

    @pytest.mark.parametrize("key", [None, 0, "frames"])
    def test_items_that_are_lists_of_frames_are_clips(self, key):
        class Data:
            def __len__(self):
                return 5

            def __getitem__(self, index):
                frames, label = PICTURES[index], LABELS[index]
                return {"frames": frames, "label": label} if key == "frames" else (frames, label)

        model = Video()
        read, labels = tokens(model, as_images(Data(), clips=4, image_key=key))
        assert torch.equal(read, expected(model, COLOURS_FIRST))
        assert labels == LABELS
        with pytest.raises(ImageError, match="may be the image"):
            as_images(Data())[0]

    def test_lists_of_frames_are_clips(self, clips):
        files = [[clips / name / f"frame{k}.png" for k in range(12)] for name in NAMES]
        ready = [[torch.from_numpy(f).permute(2, 0, 1).float() / 255 for f in clip] for clip in BYTES]
        for data in (PICTURES, files, ready):
            model = Video()
            assert torch.equal(tokens(model, as_images(data, clips=4))[0], expected(model, COLOURS_FIRST))
        with pytest.raises(ImageError, match=r"as_images\(data, clips=16\)"):
            as_images(PICTURES)[0]

    def test_arrays_of_bytes_with_named_frames_are_clips(self, tmp_path):
        model = Video()
        taken = BYTES[:, TAKEN]
        np.save(tmp_path / "clips.npy", taken)
        for given in (taken, tmp_path / "clips.npy", str(tmp_path / "clips.npy")):
            assert torch.equal(tokens(model, as_images(given, axes="NTHWC"))[0], expected(model, COLOURS_FIRST))
        moved = taken.transpose(0, 4, 1, 2, 3)
        assert torch.equal(tokens(model, as_images(moved, axes="NCTHW"))[0], expected(model, COLOURS_FIRST))

    def test_every_frame_passes_the_preprocessing_of_the_model(self, clips):
        def preprocess(frame):
            return torch.from_numpy(np.array(frame.resize((4, 4)))).permute(2, 0, 1).float() - frame.getpixel((0, 0))[0]

        model = Video()
        single = [[preprocess(clip[k]) for k in TAKEN] for clip in PICTURES]
        batch = torch.stack([torch.stack(frames, 1) for frames in single])
        for made in (preprocess, lambda frame: preprocess(frame)[None]):  # as processors of video models do
            read, _ = tokens(LoadedModel("m", model, made), as_images(clips, clips=4))
            assert torch.equal(read, expected(model, batch))
        own = LoadedModel("m", model, lambda frame: torch.zeros(3, 4, 4 + frame.getpixel((0, 0))[0] % 2))
        with pytest.raises(ImageError, match=r"frame \d of clip 'jump/clip1' has shape .* and frame 0 of clip"):
            tokens(own, as_images(clips, clips=4))


def test_the_preprocessing_of_torchvision_for_clips_takes_frames():
    model = load_model("torchvision:r3d_18", weights=None)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 140, 180), dtype=np.uint8))
    from torchvision.models.video import R3D_18_Weights

    whole = R3D_18_Weights.DEFAULT.transforms()(frames)
    for k in range(2):
        assert torch.equal(model.preprocess(Image.fromarray(frames[k].permute(1, 2, 0).numpy())), whole[:, k])


def test_clips_that_cannot_be_read_are_named(clips, tmp_path):
    with pytest.raises(ImageError, match="clip 'jump/clip1' has 12 frames, fewer than clips=13"):
        as_images(clips, clips=13)
    with pytest.raises(ImageError, match=r"clip1 holds image files itself \(frame0.png\)"):
        as_images(clips / "run" / "clip1", clips=4)
    with pytest.raises(ImageError, match="no folder of clips at"):
        as_images(tmp_path / "none" / "here", clips=4)
    for wrong in (0, 2.5, True):
        with pytest.raises(ImageError, match="clips"):
            as_images(clips, clips=wrong)
    with pytest.raises(ImageError, match=r"axes of clips must be NCTHW or NTCHW.*found 'NTHWC'"):
        as_images(clips, clips=4, axes="NTHWC")
    for images in (torch.rand(5, 3, 4, 8, 8), "digits", torch.utils.data.DataLoader(torch.rand(5, 3, 4, 8, 8))):
        with pytest.raises(ImageError, match="clips= samples the frames of a folder or of the items of a data set"):
            as_images(images, clips=4)
    (clips / "run" / "clip1" / "frame3.png").write_bytes(b"torn")
    (clips / "run" / "clip1" / "frame4.png").write_bytes(b"torn, but not used")
    with pytest.warns(UserWarning, match=r"skipped 1 of 5 clips .* run/clip1 \(frame3.png: not in a readable"):
        images = as_images(clips, clips=4)
    assert images.ids == [name for name in NAMES if name != "run/clip1"]
    with pytest.raises(ImageError, match=r"1 of 5 clips in .* cannot be read, first run/clip1: frame3.png"):
        ImagesConfig.parse({"source": str(clips), "clips": 4, "strict": True}).load()


def test_video_files_are_answered_with_frames(tmp_path):
    (tmp_path / "jump.mp4").write_bytes(b"")
    for options in ({}, {"clips": 4}):
        with pytest.raises(ImageError, match=r"jump.mp4 are not decoded: .*ffmpeg -i jump.mp4 jump/%04d.png.*clips=16"):
            as_images(tmp_path, **options)


def test_clips_have_the_identity_of_the_frames_that_are_used(clips):
    images = as_images(clips, clips=4)
    before = images.fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_images(clips, clips=4).fingerprint() == before
    assert as_images(clips, clips=5).fingerprint() != before
    PICTURES[0][0].save(clips / "run" / "clip2" / "frame7.png")
    assert as_images(clips, clips=4).fingerprint() != before
    small = resized(images, 4)
    assert [frame.size for frame in small[2].frames] == [(4, 4)] * 4
    assert small.subset([4])[0].frames[1].tobytes() == small[4].frames[1].tobytes()


# Configurations


def test_a_configuration_names_clips(clips, tmp_path):
    (tmp_path / "labels.csv").write_text("".join(f'"{name}",{k}\n' for k, name in enumerate(NAMES)))
    (tmp_path / "c.yaml").write_text(
        "study: sweep\nmodels: [{source: 'torchvision:r3d_18', weights: null}]\nlayers: [layer1]\n"
        "images: {source: clips, clips: 4, axes: NCTHW, labels: labels.csv}\n"
    )
    images = read_study(tmp_path / "c.yaml").images.load()
    assert (images.ids, images.labels) == (NAMES, list("01234"))
    assert np.array_equal(np.asarray(images[2].frames[3]), BYTES[2, 11])
    assert images[0].axes == "NCTHW"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"source": "digits", "clips": 4}, "clips: applies to folders of frames only"),
        ({"source": "x", "axes": "NHWC"}, "axes: applies to clips, .npy files"),
        ({"source": "x", "clips": 4, "axes": "NHWC"}, "axes of clips must be NCTHW or NTCHW"),
        ({"source": "x.npy", "axes": "NHXC"}, "axes must name each axis"),
        ({"source": "x", "clips": 0}, "clips: .*greater than or equal to 1"),
        ({"source": "x", "image_key": "a"}, "image_key: applies to file.py:function only"),
        ({"source": "x", "clip": 4}, "clip: unknown key; nearest: 'clips'"),
        ({"source": "x.py:images"}, "--allow-code"),
    ],
)
def test_keys_of_images_that_do_not_fit_are_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        ImagesConfig.parse(keys)


def test_a_configuration_takes_arrays_and_functions(tmp_path):
    np.save(tmp_path / "images.npy", BYTES[:, 0])
    (tmp_path / "mine.py").write_text(
        "import numpy as np\ndef images():\n    data = np.load(__file__.replace('mine.py', 'images.npy'))\n"
        "    return [{'a': data[k], 'b': data[k] * 0, 'y': k, 'z': 7} for k in range(5)]\n"
        "def broken():\n    1 / 0\n"
        "def loader():\n    from torch.utils.data import DataLoader\n    return DataLoader(images())\n"
    )

    def load(lines, allow_code=True):
        (tmp_path / "c.yaml").write_text(f"study: sweep\nmodels: [{{source: 'timm:resnet18'}}]\nimages: {lines}\n")
        return read_study(tmp_path / "c.yaml", allow_code=allow_code).images.load()

    images = load("{source: images.npy, axes: NHWC}", allow_code=False)
    assert np.array_equal(np.asarray(images[2]), BYTES[2, 0])
    images = load("{source: 'mine.py:images', image_key: a, label_key: z, size: 4}")
    assert (images.labels[2], images[2].size) == ("7", (4, 4))
    assert len(load("{source: 'mine.py:images', image_key: a, count: 3}")) == 3
    with pytest.raises(ImageError, match=r"mine.py:broken failed to return images: ZeroDivisionError"):
        load("{source: 'mine.py:broken'}")
    with pytest.raises(ImageError, match=r"mine.py has no function 'image'; nearest: 'images'"):
        load("{source: 'mine.py:image'}")
    with pytest.raises(ImageError, match="comes from a loader; give the loader's data set"):
        load("{source: 'mine.py:loader', image_key: a}")


def test_labels_are_given_by_id(clips, tmp_path):
    images = as_images(clips, clips=4, labels={name: k for k, name in enumerate(NAMES)})
    assert images.labels == list("01234")
    with pytest.raises(ImageError, match="labels lack 4 of 5 images, first 'jump/clip2'; nearest: 'jump/clip'"):
        as_images(clips, clips=4, labels={"jump/clip1": 1, "jump/clip": 2})
    for text, said in (("a,b,c\n", "line 1: expected id,label, found 3"), ("a,1\n\na,2\n", "line 3: image 'a' has a")):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(ImageError, match=said):
            ImagesConfig.parse({"source": str(clips), "labels": str(tmp_path / "labels.csv")}).load()


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_files_that_can_run_code_are_answered_with_what_reads_them(tmp_path, suffix):
    file = tmp_path / f"images{suffix}"
    torch.save(COLOURS_FIRST, file)
    with pytest.raises(ImageError, match=r"may hold objects that run code.*as_images\((torch.load\('.*'.*?\))\)") as e:
        as_images(file)
    reading = str(e.value).partition("as_images(")[2].partition("weights_only=True)")[0] + "weights_only=True)"
    assert torch.equal(as_images(eval(reading))[2], COLOURS_FIRST[2])
