"""Miniatures of the published layouts, for tests of their readers. To be imported; it holds no test."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from factory import corpora
from factory.corpora.base import Entry
from factory.recipe import CorpusSection, PhantomSection

JPEG = "jpg"  # stands for the bytes of a small image; any other text is a file as it is


def picture(kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 120, 100)).save(out, kind)
    return out.getvalue()


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture() if content == JPEG else content.encode())
    return root


def listed(name: str, root: Path | str, **settings: Any) -> dict[str, Entry]:
    section = CorpusSection(sources={name: str(root)}, phantoms=PhantomSection(count=2, size=32, seed=7), **settings)
    return {entry.source_id: entry for entry in corpora.list_entries(section)}


@dataclass(frozen=True)
class Layout:
    """Files of a miniature, and what must be known of each entry, by id."""

    files: dict[str, str]
    expected: dict[str, dict[str, Any]]
    masks: dict[str, str] = field(default_factory=dict)


ISIC_ARCHIVE = "isic_id,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,"
ISIC_ARCHIVE += (
    "diagnosis_confirm_type,fitzpatrick_skin_type,image_type,lesion_id,patient_id,sex,clin_size_long_diam_mm\n"
)
DERM12345 = "image_id,patient_id,image_type,copyright-license,split,super_class,malignancy,main_class_1,label\n"
ONE_HOT_2019 = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
ONE_HOT_2018 = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
TRUTH_2020 = "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant\n"
TILES = "isic_id,target,patient_id,lesion_id,age_approx,sex,anatom_site_general,clin_size_long_diam_mm,image_type,"
TILES += "copyright_license,iddx_full,iddx_1,iddx_2,iddx_3\n"
MILK = "lesion_id,image_type,isic_id,copyright_license,age_approx,sex,skin_tone_class,site,MONET_hair\n"
MILK_TRUTH = "lesion_id,AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,VASC\n"
PAD = "patient_id,lesion_id,age,gender,fitspatrick,region,diameter_1,diameter_2,diagnostic,img_id,biopsed\n"
DDI = ",DDI_ID,DDI_file,skin_tone,malignant,disease\n"
HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
DERM7PT = "case_num,diagnosis,seven_point_score,location,sex,clinic,derm,case_id\n"
FITZ = "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url\n"
PH2 = "||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network || Colors ||\n"

LAYOUTS: dict[str, Layout] = {
    "mednode": Layout(
        {"complete_mednode_dataset/melanoma/1.jpg": JPEG, "complete_mednode_dataset/naevus/2.jpg": JPEG},
        {
            "melanoma/1.jpg": {"diagnosis": "melanoma", "malignant": True, "modality": "clinical"},
            "naevus/2.jpg": {"label": "naevus", "diagnosis": "nevus", "ham7": "nv"},
        },
    ),
    "hiba": Layout(
        {
            "hiba_metadata_2024-01-01.csv": ISIC_ARCHIVE
            + "ISIC_1,CC-BY,60,head/neck,Malignant,Malignant epidermal proliferations,Squamous cell carcinoma in situ,"
            "histopathology,II,clinical: close-up,IL_1,IP_1,female,6.5\n"
            + "ISIC_2,CC-BY,,,Benign,Benign soft tissue proliferations - Vascular,,,,dermoscopic,IL_2,IP_1,,\n"
            + "ISIC_3,CC-BY,,,Indeterminate,,,,,dermoscopic,IL_3,IP_2,,\n"
            + "ISIC_4,CC-BY,,,,,,,,dermoscopic,IL_4,IP_2,,\n",
            "deep/ISIC_1.jpg": JPEG, "ISIC_2.JPG": JPEG, "ISIC_3.jpg": JPEG, "ISIC_4.jpg": JPEG,
        },
        {
            "ISIC_1": {
                "diagnosis": "bowen_disease", "stated_malignant": True, "confirmation": "histology", "skin_type": "II",
                "skin_type_scale": "fst", "modality": "clinical", "site": "head_neck", "age": 60.0, "sex": "female",
                "patient_id": "IP_1", "lesion_id": "IL_1", "diameter_mm": 6.5, "licence": "CC-BY-4.0",
            },
            "ISIC_2": {"diagnosis": "vascular", "skin_type": None, "skin_type_scale": None, "age": None},
            "ISIC_3": {"diagnosis": None, "excluded": "neither benign nor malignant", "stated_malignant": None},
            "ISIC_4": {"problem": "missing_label"},
        },
    ),
    "derm12345": Layout(
        {
            "derm12345_metadata_train.csv": DERM12345
            + "DERM_1,PID_1,dermoscopic,CC-BY,train,nonmelanocytic,indeterminate,keratinocytic,ak\n",
            "derm12345_metadata_test.csv": DERM12345
            + "DERM_2,PID_2,dermoscopic,CC-BY,test,melanocytic,benign,banal,srjd\n",
            "derm12345_train_part_1/ak/DERM_1.jpg": JPEG, "derm12345_test/srjd/DERM_2.jpg": JPEG,
        },
        {
            "DERM_1": {"diagnosis": "actinic_keratosis", "stated_malignant": None, "split_hint": "train"},
            "DERM_2": {"diagnosis": "nevus", "stated_malignant": False, "split_hint": "test", "patient_id": "PID_2"},
        },
    ),
    "isic2019": Layout(
        {
            "ISIC_2019_Training_GroundTruth.csv": ONE_HOT_2019
            + "ISIC_1,0,0,0,1.0,0,0,0,0,0\nISIC_3,0,0,0,0,0,0,0,0,1\n",
            "ISIC_2019_Training_Metadata.csv": "image,age_approx,anatom_site_general,lesion_id,sex\n"
            "ISIC_1,55,oral/genital,BCN_1,male\n",
            "ISIC_2019_Training_Input/ISIC_2019_Training_Input/ISIC_1.jpg": JPEG,
            "ISIC_2019_Training_Input/ISIC_2019_Training_Input/ISIC_3.jpg": JPEG,
            "ISIC_2019_Test_Metadata.csv": "image,age_approx,anatom_site_general,sex\nISIC_2,40,,female\n",
            "ISIC_2019_Test_Input/ISIC_2.jpg": JPEG,
        },
        {
            "ISIC_1": {
                "diagnosis": "actinic_keratosis", "site": "oral_genital", "lesion_id": "BCN_1", "split_hint": "train",
            },
            "ISIC_2": {"label": None, "problem": "missing_label", "split_hint": "test", "age": 40.0},
            "ISIC_3": {
                "label": "UNK", "diagnosis": None,
                "excluded": "any other diagnosis; benign or malignant is not said",
            },
        },
    ),
    "isic2020": Layout(
        {
            "ISIC_2020_Training_GroundTruth_v2.csv": TRUTH_2020
            + "ISIC_1,IP_1,IL_1,male,45.0,torso,unknown,benign\nISIC_2,IP_1,IL_2,male,45.0,,melanoma,malignant\n",
            "ISIC_2020_Training_Duplicates.csv": "image_name_1,image_name_2\nISIC_2,ISIC_1\n",
            "ISIC_2020_Training_JPEG/train/ISIC_1.jpg": JPEG, "ISIC_2020_Training_JPEG/train/ISIC_2.jpg": JPEG,
        },
        {
            "ISIC_1": {
                "diagnosis": "unspecified_benign", "stated_malignant": False, "lesion_id": "IL_1", "same_as": None,
                "confirmation": None, "site": "torso",
            },
            "ISIC_2": {
                "diagnosis": "melanoma", "stated_malignant": True, "same_as": "ISIC_1", "confirmation": "histology",
            },
        },
    ),
    "isic2024": Layout(
        {
            "train-metadata.csv": TILES
            + "ISIC_1,0,IP_1,,50,male,lower extremity,3.1,TBP tile: close-up,CC-BY,Benign,Benign,,\n"
            + "ISIC_2,1,IP_2,IL_2,50,male,,9.0,TBP tile: close-up,CC-BY-NC,x,Malignant,y,\"Melanoma, NOS\"\n"
            + "ISIC_4,1,IP_2,,50,male,,9.0,TBP tile: close-up,CC-0,,,,\n",
            "train-image/image/ISIC_1.jpg": JPEG, "train-image/image/ISIC_2.jpg": JPEG,
            "train-image/image/ISIC_4.jpg": JPEG,
            "test-metadata.csv": TILES.replace("target,", "").partition(",iddx_full")[0]
            + "\nISIC_3,IP_3,,50,male,,2.0,TBP tile: close-up,CC-BY\n",
            "test-image/image/ISIC_3.jpg": JPEG,
        },
        {
            "ISIC_1": {
                "diagnosis": "unspecified_benign", "modality": "tbp_tile", "diameter_mm": 3.1, "licence": "CC-BY-4.0",
                "confirmation": "clinical", "stated_malignant": False,
            },
            "ISIC_2": {"diagnosis": "melanoma", "licence": "CC-BY-NC-4.0", "confirmation": "histology"},
            "ISIC_3": {"problem": "missing_label", "split_hint": "test"},
            "ISIC_4": {"diagnosis": "unspecified_malignant", "licence": "CC0-1.0", "split_hint": None},
        },
    ),
    "milk10k": Layout(
        {
            "MILK10k_Training_Metadata.csv": MILK
            + "IL_1,dermoscopic,ISIC_1,CC-BY-NC,70,male,1,head_neck_face,.1\n"
            + "IL_1,clinical: close-up,ISIC_2,CC-BY-NC,70,male,1,head_neck_face,.1\n"
            + "IL_2,dermoscopic,ISIC_3,CC-BY-NC,,female,5,,.1\n",
            "MILK10k_Training_GroundTruth.csv": MILK_TRUTH + "IL_1,1,0,0,0,0,0,0,0,0,0,0\n",
            "MILK10k_Training_Supplement.csv": "isic_id,diagnosis_full,diagnosis_confirm_type\n"
            'ISIC_1,"Squamous cell carcinoma in situ, Bowens disease",histopathology\n',
            "MILK10k_Training_Input/IL_1/ISIC_1.jpg": JPEG, "MILK10k_Training_Input/IL_1/ISIC_2.jpg": JPEG,
            "MILK10k_Training_Input/IL_2/ISIC_3.jpg": JPEG,
            "MILK10k_Test_Metadata.csv": MILK + "IL_9,dermoscopic,ISIC_9,CC-BY-NC,70,male,2,hand,.1\n",
            "MILK10k_Test_Input/IL_9/ISIC_9.jpg": JPEG,
        },
        {
            "ISIC_1": {
                "diagnosis": "bowen_disease", "modality": "dermoscopic", "confirmation": "histology", "skin_type": "1",
                "skin_type_scale": "milk10k", "skin_type_source": "expert", "site": "head_neck", "lesion_id": "IL_1",
            },
            "ISIC_2": {"label": "AKIEC", "diagnosis": "ak_iec_mixed", "modality": "clinical", "confirmation": None},
            "ISIC_3": {"problem": "missing_label", "lesion_id": "IL_2"},
            "ISIC_9": {"label": None, "problem": "missing_label", "split_hint": "test", "site": "hand"},
        },
    ),
    "pad-ufes-20": Layout(
        {
            "metadata.csv": PAD
            + "PAT_1,7,55,FEMALE,3.0,NECK,5.0,6.0,SCC,PAT_1_7_1.png,True\n"
            + "PAT_2,8,8,,,ARM,0.0,,ACK,PAT_2_8_2.png,False\n",
            "images/imgs_part_1/imgs_part_1/PAT_1_7_1.png": JPEG, "images/imgs_part_2/PAT_2_8_2.png": JPEG,
        },
        {
            "PAT_1_7_1": {
                "diagnosis": "squamous_cell_carcinoma", "confirmation": "histology", "skin_type": "III",
                "skin_type_scale": "fst", "diameter_mm": 6.0, "sex": "female", "patient_id": "PAT_1", "lesion_id": "7",
            },
            "PAT_2_8_2": {
                "diagnosis": "actinic_keratosis", "confirmation": "clinical", "skin_type": None, "diameter_mm": None,
                "sex": None, "site": "upper_extremity",
            },
        },
    ),
    "kaggle1": Layout(
        {
            "melanoma_cancer_dataset/train/benign/melanoma_1.jpg": JPEG,
            "melanoma_cancer_dataset/test/malignant/melanoma_1.jpg": JPEG,
        },
        {
            "test/malignant/melanoma_1.jpg": {"diagnosis": "unspecified_malignant", "split_hint": "test"},
            "train/benign/melanoma_1.jpg": {"diagnosis": "unspecified_benign", "split_hint": "train"},
        },
    ),
    "kaggle2": Layout(
        {"train/Benign/1.jpg": JPEG, "test/Malignant/2.jpg": JPEG},
        {
            "test/Malignant/2.jpg": {"label": "malignant", "stated_malignant": True, "split_hint": "test"},
            "train/Benign/1.jpg": {"label": "benign", "malignant": False, "split_hint": "train"},
        },
    ),
    "ddi": Layout(
        {
            "ddi_metadata.csv": DDI + "0,1,000001.png,56,TRUE,mycosis-fungoides\n1,2,000002.png,12,FALSE,wart\n",
            "000001.png": JPEG, "images/000002.png": JPEG,
        },
        {
            "000001": {
                "diagnosis": "other_malignant", "stated_malignant": True, "skin_type": "56", "skin_type_scale": "ddi",
                "skin_type_source": "expert", "confirmation": "histology", "modality": "clinical",
            },
            "000002": {"diagnosis": "other_benign", "stated_malignant": False},
        },
    ),
    "ham10000": Layout(
        {
            "HAM10000_metadata.csv": HAM
            + "HAM_1,ISIC_1,akiec,histo,80,male,scalp\nHAM_1,ISIC_2,akiec,consensus,,unknown,unknown\n",
            "HAM10000_images_part_1/ISIC_1.jpg": JPEG, "HAM10000_images_part_2/ISIC_2.jpg": JPEG,
            "HAM10000_segmentations_lesion_tschandl/ISIC_1_segmentation.png": JPEG,
        },
        {
            "ISIC_1": {
                "diagnosis": "ak_iec_mixed", "ham7": "akiec", "malignant": True, "confirmation": "histology",
                "site": "head_neck", "age": 80.0, "lesion_id": "HAM_1",
            },
            "ISIC_2": {"confirmation": "consensus", "site": None, "age": None, "sex": None},
        },
        {"ISIC_1": "HAM10000_segmentations_lesion_tschandl/ISIC_1_segmentation.png"},
    ),
    "isic2017": Layout(
        {
            "ISIC-2017_Training_Part3_GroundTruth.csv": "image_id,melanoma,seborrheic_keratosis\nISIC_1,1.0,0.0\n",
            "ISIC-2017_Training_Data/ISIC_1.jpg": JPEG,
            "ISIC-2017_Training_Part1_GroundTruth/ISIC_1_segmentation.png": JPEG,
        },
        {"ISIC_1": {"diagnosis": "melanoma", "licence": "CC0-1.0", "split_hint": "train"}},
        {"ISIC_1": "ISIC-2017_Training_Part1_GroundTruth/ISIC_1_segmentation.png"},
    ),
    "isic2018": Layout(
        {
            "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv": ONE_HOT_2018
            + "ISIC_3,0,0,0,1,0,0,0\n",
            "ISIC2018_Task3_Training_LesionGroupings.csv": "image,lesion_id,diagnosis_confirm_type\n"
            "ISIC_3,HAM_3,serial imaging showing no change\n",
            "ISIC2018_Task3_Training_Input/ISIC_3.jpg": JPEG,
            "ISIC2018_Task1-2_Training_Input/ISIC_1.jpg": JPEG,
            "ISIC2018_Task1_Training_GroundTruth/ISIC_1_segmentation.png": JPEG,
            "ISIC2018_Task1-2_Test_Input/ISIC_2.jpg": JPEG,
            "ISIC2018_Task3_Validation_GroundTruth.csv": ONE_HOT_2018 + "ISIC_4,0,1,0,0,0,0,0\n",
            "ISIC2018_Task3_Validation_Input/ISIC_4.jpg": JPEG,
        },
        {
            "ISIC_1": {"label": None, "problem": None, "domain": "dermatology", "split_hint": "train"},
            "ISIC_2": {"label": None, "problem": "missing_label", "split_hint": "test"},
            "ISIC_3": {
                "diagnosis": "ak_iec_mixed", "lesion_id": "HAM_3", "confirmation": "follow_up", "split_hint": "train",
            },
            "ISIC_4": {"diagnosis": "nevus", "split_hint": "test"},
        },
        {"ISIC_1": "ISIC2018_Task1_Training_GroundTruth/ISIC_1_segmentation.png"},
    ),
    "ph2": Layout(
        {
            "PH2_dataset.txt": PH2
            + "|| IMD002 ||             || 1 || 1 | T | A || 3  4 ||\n"
            + "|| IMD003 || Melanoma    || 2 || 2 | AT | P || 1  5  6 ||\n"
            + "Clinical Diagnosis: 0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma.\n",
            "PH2 Dataset images/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp": JPEG,
            "PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image/IMD003.bmp": JPEG,
            "PH2 Dataset images/IMD003/IMD003_lesion/IMD003_lesion.bmp": JPEG,
            "PH2 Dataset images/IMD003/IMD003_roi/IMD003_R1_Label4.bmp": JPEG,
        },
        {
            "IMD002": {
                "label": "atypical nevus", "diagnosis": "nevus", "expert_asymmetry": 1.0, "confirmation": "clinical",
                "expert_colors": ("light-brown", "dark-brown"),
            },
            "IMD003": {
                "diagnosis": "melanoma", "expert_asymmetry": 2.0, "confirmation": "histology",
                "expert_colors": ("black", "blue-gray", "white"),
            },
        },
        {"IMD003": "PH2 Dataset images/IMD003/IMD003_lesion/IMD003_lesion.bmp"},
    ),
    "derm7pt": Layout(
        {
            "meta/meta.csv": DERM7PT
            + "10,melanoma (in situ),5,back,female,NEL/a.jpg,NEL/b.jpg,\n"
            + "2,clark nevus,1,acral,male,NEL/c.jpg,NEL/no.jpg,\n",
            "meta/train_indexes.csv": "indexes\n1\n", "meta/valid_indexes.csv": "indexes\n0\n",
            "images/NEL/a.jpg": JPEG, "images/NEL/b.jpg": JPEG, "images/NEL/c.jpg": JPEG,
        },
        {
            "0002-clinic": {"diagnosis": "nevus", "modality": "clinical", "split_hint": "train", "site": "palms_soles"},
            "0002-derm": {"problem": "missing_image", "modality": "dermoscopic"},
            "0010-clinic": {"diagnosis": "melanoma", "split_hint": "val", "lesion_id": "10"},
            "0010-derm": {"modality": "dermoscopic", "sex": "female", "site": "posterior_torso"},
        },
    ),
    "fitzpatrick17k": Layout(
        {
            "fitzpatrick17k.csv": FITZ
            + "a,6,5,lentigo maligna,malignant melanoma,malignant,,http\n"
            + "b,-1,3,syringoma,benign dermal,benign,1 Diagnostic,http\n"
            + "c,2,2,psoriasis,inflammatory,non-neoplastic,,http\n"
            + "d,2,2,melanoma,malignant melanoma,malignant,3 Wrongly labelled,http\n",
            "images/a.jpg": JPEG, "images/b.jpg": JPEG, "data/finalfitz17k/c.jpg": JPEG, "images/d.jpg": JPEG,
        },
        {
            "a": {"diagnosis": "melanoma", "skin_type": "VI", "skin_type_scale": "fst", "stated_malignant": True},
            "b": {"label": "benign", "diagnosis": "other_benign", "skin_type": None, "skin_type_scale": None},
            "c": {"label": "non-neoplastic", "excluded": "a rash or an infection rather than a lesion"},
            "d": {"diagnosis": None, "excluded": "its publishers' own check found the label wrong"},
        },
    ),
    "cvc-clinicdb": Layout(
        {
            "PNG/Original/10.png": JPEG, "PNG/Original/9.png": JPEG, "PNG/Ground Truth/9.png": JPEG,
            "PNG/Ground Truth/11.png": JPEG, "metadata.csv": "frame_id,sequence_id\n9,1\n10,2\n",
        },
        {
            "10": {"lesion_id": "2", "problem": None},
            "11": {"problem": "mask_without_image"},
            "9": {"diagnosis": "polyp", "domain": "colonoscopy", "malignant": None, "lesion_id": "1"},
        },
        {"9": "PNG/Ground Truth/9.png", "11": "PNG/Ground Truth/11.png"},
    ),
    "kvasir-seg": Layout(
        {"Kvasir-SEG/images/cju.jpg": JPEG, "Kvasir-SEG/masks/cju.jpg": JPEG},
        {"cju": {"diagnosis": "polyp", "domain": "colonoscopy", "modality": "colonoscopy"}},
        {"cju": "Kvasir-SEG/masks/cju.jpg"},
    ),
    "refuge2": Layout(
        {
            "train/images/g1.jpg": JPEG, "train/images/n1.jpg": JPEG, "train/mask/g1.bmp": JPEG,
            "validation/Images/V1.jpg": JPEG, "validation/gts/V1.bmp": JPEG, "test/images/T1.jpg": JPEG,
            "test/images/T2.jpg": JPEG, "test/mask/T9.bmp": JPEG,
            "test/index.json": '{"0": {"ImgName": "T1.jpg", "Label": 1}, "1": {"ImgName": "T2.jpg"}}',
        },
        {
            "test/T1": {"diagnosis": "glaucoma", "split_hint": "test"},
            "test/T2": {"label": None, "problem": None, "domain": "fundus"},
            "test/T9": {"problem": "mask_without_image"},
            "train/g1": {"diagnosis": "glaucoma", "domain": "fundus", "malignant": None, "modality": "fundus"},
            "train/n1": {"diagnosis": "no_glaucoma", "split_hint": "train"},
            "val/V1": {"label": None, "domain": "fundus", "split_hint": "val"},
        },
        {"train/g1": "train/mask/g1.bmp", "val/V1": "validation/gts/V1.bmp", "test/T9": "test/mask/T9.bmp"},
    ),
    "folder": Layout(
        {"polyp/a.png": JPEG, "polyp/a_mask.png": JPEG, "nevus/b.jpg": JPEG},
        {
            "nevus/b.jpg": {"diagnosis": "nevus", "domain": "dermatology", "modality": None},
            "polyp/a.png": {"diagnosis": "polyp", "domain": "colonoscopy"},
        },
        {"polyp/a.png": "polyp/a_mask.png"},
    ),
}  # fmt: skip
