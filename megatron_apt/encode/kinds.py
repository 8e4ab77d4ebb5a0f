"""Kinds of files by suffix: what is decoded and how, what is media that nothing here
decodes, and what is no input at all.

Only the walk through a folder asks what an input is; a manifest names its files, and they
are tried whatever they are called.
"""

from pathlib import PurePath


def _suffixes(names: str) -> frozenset[str]:
    return frozenset("." + name for name in names.split())


IMAGE_SUFFIXES = _suffixes(
    "png jpg jpeg jpe jfif mpo webp bmp tif tiff jp2 j2k j2c jpc jpf jpx pnm ppm pgm pbm"
)
"""Still pictures that DALI decodes: one frame each."""

PICTURE_SUFFIXES = _suffixes("gif apng avif avifs tga qoi pcx sgi dds ras")
"""Pictures that FFmpeg decodes as videos of one frame or, where they move (gif, apng, avifs), of many."""

VIDEO_SUFFIXES = _suffixes(
    "mp4 m4v mov qt mkv mk3d webm avi divx mpg mpeg mpe mp2v m2v m1v mpv ts mts m2ts m2t trp tod mod vob evo "
    "3gp 3gpp 3g2 3gp2 wmv asf flv f4v ogv ogm ogx mxf gxf dv dif nut rm rmvb swf wtv y4m ivf obu mjpeg mjpg "
    "h264 264 avc h265 265 hevc vvc insv lrv amv mlv nsv mj2 mjp2"
)
"""Videos: everything that FFmpeg reads as one."""

MEDIA_SUFFIXES = IMAGE_SUFFIXES | PICTURE_SUFFIXES | VIDEO_SUFFIXES

_EXPORT = "pictures of this kind are not taken; convert it to PNG or JPEG"
_RAW_PHOTOS = (
    "dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f 3fr fff iiq mrw kdc dcr erf mos gpr rwl raw"
)
_DESIGNS = "psd psb xcf kra ora ai eps ps pdf svg svgz djvu cdr wmf emf indd sketch afphoto clip procreate"
_OTHERS = (
    "ico cur icns jxr hdp wdp bpg flif jbig jbig2 fits fit fts dcm dicom pcd pict pct fli flc jng mng xpm xbm"
)
UNDECODED: dict[str, str] = {
    **dict.fromkeys(
        _suffixes("heic heif hif heics heifs"),
        "HEIC photos are not decoded here; convert them to JPEG (heif-convert does)",
    ),
    **dict.fromkeys(
        _suffixes("jxl"), "JPEG XL is not decoded here; convert it to PNG or JPEG (for example with djxl)"
    ),
    **dict.fromkeys(
        _suffixes(_RAW_PHOTOS), "raw photos are not decoded here; develop them and export PNG or JPEG"
    ),
    **dict.fromkeys(
        _suffixes(_DESIGNS), "documents and drawings are not decoded here; export the picture as PNG"
    ),
    **dict.fromkeys(
        _suffixes("exr hdr pfm rgbe dpx cin"),
        "linear-light and film pictures are not decoded here; tone-map them and export PNG",
    ),
    **dict.fromkeys(_suffixes(_OTHERS), _EXPORT),
    **dict.fromkeys(
        _suffixes("r3d braw ari crm"), "raw camera video is not decoded here; export a video from it"
    ),
    **dict.fromkeys(
        _suffixes("m3u8 m3u mpd ism pls"), "a playlist, which is not followed; give the video itself"
    ),
    **dict.fromkeys(
        _suffixes("part crdownload partial !ut opdownload aria2"),
        "a download that did not end; finish it or remove the file",
    ),
}
"""Media that nothing here decodes, and what to do about it."""

COMPANIONS = _suffixes(
    "txt json jsonl csv tsv md rst yaml yml toml ini xml xmp aae thm srt vtt ass ssa sub nfo log html htm "
    "lnk url db sha256 md5"
)
"""Text and metadata that lie beside pictures and videos: no inputs, and no reason to mention them."""


def suffix_of(path: PurePath | str) -> str:
    """The suffix in lower case; "" without."""
    return PurePath(path).suffix.lower()
