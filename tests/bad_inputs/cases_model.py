"""Bad inputs around models: shards, checkpoints and weights that are damaged, settings that cannot be."""

from __future__ import annotations

from . import worlds
from .case import Case

PRETRAIN = (
    "train pretrain --data tokens --tokenizer tokenizer --preset koine-0.5m --steps 2 --batch-size 2 "
    "--sequence-length 32 --out new"
)
MIXTURE = "train pretrain --mixture mixture.json --tokenizer tokenizer --preset koine-0.5m --out new"
RESUME = PRETRAIN.replace("--out new", "--out halfway")
CHAT = "chat model --once hello"
EVALUATE = "evaluate model --data text.jsonl"

CASES = (
    Case(
        mistake="a flipped byte in a token shard",
        command=PRETRAIN,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.flip_byte("tokens/shard-00000.tokens")),
        says="tokens/shard-00000.tokens: does not match the sha256 in the manifest; it is damaged; tokenize again, or copy the folder again",
    ),
    Case(
        mistake="a token shard cut short",
        command=PRETRAIN,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.cut("tokens/shard-00000.tokens")),
        says="tokens/shard-00000.tokens: has 9580 bytes, the manifest says 19160; it is truncated or was changed; tokenize again",
    ),
    Case(
        mistake="a token shard that is gone",
        command=PRETRAIN,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.removed("tokens/shard-00000.offsets")),
        says="tokens/shard-00000.offsets: is missing; tokenize again, or copy the folder whole",
    ),
    Case(
        mistake="a manifest that is not JSON",
        command=PRETRAIN,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.cut("tokens/manifest.json")),
        says="tokens/manifest.json: not valid JSON (Expecting ',' delimiter: line 30 column 3 (char 535)); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a manifest that is JSON and no manifest",
        command=PRETRAIN,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.written("tokens/manifest.json", "[]")),
        says="tokens/manifest.json: is not a JSON object; it is damaged; tokenize again",
    ),
    Case(
        mistake="the same token shards twice",
        command=PRETRAIN.replace("--data tokens", "--data tokens:0.4 --data tokens:0.6"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="tokens: is given more than once; give it once: tokens:1",
    ),
    Case(
        mistake="a model in a place where nothing can be made",
        command=PRETRAIN.replace("--out new", "--out /proc/new"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="/proc/new: no file can be made here; choose another place, and leave the folder alone while this runs",
    ),
    Case(
        mistake="text where token shards are needed",
        command=PRETRAIN.replace("--data tokens", "--data text.jsonl"),
        prepare=worlds.having("text", "tokenizer"),
        says="text.jsonl: holds no token shards (manifest.json is missing); write them with `koine data tokenize`",
    ),
    Case(
        mistake="token shards of another tokenizer",
        command=PRETRAIN,
        prepare=worlds.having(
            "tokens",
            "tokenizer",
            then=worlds.edited_json("tokenizer/tokenizer.json", version="1.0", padding=None),
        ),
        says="tokens: tokenized with another tokenizer than tokenizer; run `koine data tokenize` again with this tokenizer, or give the one that was used",
    ),
    Case(
        mistake="a preset with a typo",
        command=PRETRAIN.replace("koine-0.5m", "koine-05m"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="unknown preset 'koine-05m'; did you mean 'koine-0.5m' or 'koine-35m' or 'koine-350m'?",
    ),
    Case(
        mistake="a negative number of steps",
        command=PRETRAIN.replace("--steps 2", "--steps -2"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="steps is -2; give --steps with a number of at least 1",
    ),
    Case(
        mistake="a batch of nothing",
        command=PRETRAIN.replace("--batch-size 2", "--batch-size 0"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="batch_size is 0; it must be at least 1",
    ),
    Case(
        mistake="a sequence longer than the model allows",
        command=PRETRAIN.replace("--sequence-length 32", "--sequence-length 100000000"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="a sequence length of 100000000 is longer than the model allows; choose at most 131072",
    ),
    Case(
        mistake="a negative learning rate",
        command=PRETRAIN + " --learning-rate -1",
        prepare=worlds.having("tokens", "tokenizer"),
        says="learning_rate is -1.0; it must be greater than 0",
    ),
    Case(
        mistake="neither text nor a mixture to train on",
        command="train pretrain --preset koine-0.5m --steps 2 --out new",
        says="give either --data or --mixture; --data TOKENS[:PROPORTION] may be repeated",
    ),
    Case(
        mistake="a window where every layer is full",
        command=PRETRAIN + " --attention rope --window 16",
        prepare=worlds.having("tokens", "tokenizer"),
        says="rope has no use for a window; choose rnope-swa, or leave it out",
    ),
    Case(
        mistake="other layers for a model that has its own",
        command="train pretrain --model model --data tokens --steps 2 --attention nope --out new",
        prepare=worlds.having("model", "tokens"),
        says="--attention with --model: the layers of a model do not change; leave it out, or start a new one with --preset; --rope-theta may change",
    ),
    Case(
        mistake="a rotary base where nothing is rotated",
        command=PRETRAIN + " --attention nope --rope-theta 50000",
        prepare=worlds.having("tokens", "tokenizer"),
        says="no layer has RoPE, so rope_theta has no effect; leave it out with nope",
    ),
    Case(
        mistake="long sequences that are half described",
        command=PRETRAIN + " --long-every 2 --long-sequence-length 64",
        prepare=worlds.having("tokens", "tokenizer"),
        says="batches of long sequences are not wholly described; give --long-every, --long-sequence-length and --long-batch-size",
    ),
    Case(
        mistake="long sequences that are no longer than the others",
        command=PRETRAIN + " --long-every 2 --long-sequence-length 32 --long-batch-size 1",
        prepare=worlds.having("tokens", "tokenizer"),
        says="phase 'train': its long rows have 32 tokens, the others 32; long rows must be longer",
    ),
    Case(
        mistake="no document that is long enough",
        command=PRETRAIN
        + " --long-every 2 --long-sequence-length 64 --long-batch-size 1 --long-min-tokens 5000",
        prepare=worlds.having("tokens", "tokenizer"),
        says="tokens: holds no document of 5000 tokens, the longest has …; lower min_tokens, or give longer text",
    ),
    Case(
        mistake="proportions that do not sum to one",
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.write_mixture(source={"proportion": 0.7})),
        says="mixture.json: phase 'pretrain': the proportions sum to 0.7, not 1; they are tales 0.7",
    ),
    Case(
        mistake="a negative proportion",
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.write_mixture(source={"proportion": -1})),
        says="mixture.json: source 'tales': proportion is -1; it must be greater than 0",
    ),
    Case(
        mistake="a proportion that is no number",
        command=PRETRAIN.replace("--data tokens", "--data tokens:half"),
        prepare=worlds.having("tokens", "tokenizer"),
        says="tokens:half: 'half' is no proportion; write PATH:0.3, for example",
    ),
    Case(
        mistake="weights for a language that does not exist",
        command=MIXTURE,
        prepare=worlds.having(
            "tokens", "tokenizer", then=worlds.write_mixture(source={"languages": {"dee": 1}})
        ),
        says="mixture.json: unknown language 'dee'; did you mean 'de' (German) or 'ee' (Ewe) or 'gez' (Geez)?",
    ),
    Case(
        mistake="weights for a language that the source does not have",
        command=MIXTURE,
        prepare=worlds.having(
            "tokens", "tokenizer", then=worlds.write_mixture(source={"languages": {"fr": 1}})
        ),
        says="tokens: holds no document in 'fr'; known: de, en",
    ),
    Case(
        mistake="a mixture with a misspelt key",
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.write_mixture(sequnce_length=32)),
        says="mixture.json: unknown key 'sequnce_length'; did you mean 'sequence_length'?",
    ),
    Case(
        mistake="languages of a mixture without their weights",
        command=MIXTURE,
        prepare=worlds.having(
            "tokens", "tokenizer", then=worlds.write_mixture(source={"languages": ["de", "en"]})
        ),
        says="mixture.json: source 'tales': languages is ['de', 'en']; it must be an object of weights by language code",
    ),
    Case(
        mistake="a number of a mixture that is not whole",
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.write_mixture(batch_size=2.5)),
        says="mixture.json: batch_size is 2.5; it must be an integer",
    ),
    Case(
        mistake="a word where a mixture has true or false",
        command=MIXTURE,
        prepare=worlds.having(
            "tokens", "tokenizer", then=worlds.write_mixture(cross_document_attention="no")
        ),
        says="mixture.json: cross_document_attention is 'no'; it must be true or false",
    ),
    Case(
        mistake="a dry run of what would be refused",
        command=MIXTURE + " --dry-run",
        prepare=worlds.having(
            "tokens", "tokenizer", then=worlds.write_mixture(source={"languages": {"fr": 1}})
        ),
        says="tokens: holds no document in 'fr'; known: de, en",
    ),
    Case(
        mistake="a mixture that is not JSON",
        command=MIXTURE,
        prepare=worlds.having("tokens", "tokenizer", then=worlds.written("mixture.json", '{"phases": [')),
        says="mixture.json: not valid JSON (Expecting value: line 1 column 13 (char 12)); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a model and tokens of different vocabularies",
        command="train pretrain --model model --data tokens --steps 2 --sequence-length 32 --batch-size 2 --out new",
        prepare=worlds.having("model", "tokens", then=worlds.shrink_vocabulary),
        says="the data have ids up to 294, the model knows 200; tokenize with the model's own tokenizer",
    ),
    Case(
        mistake="fine-tuning on documents in place of chats",
        command="train sft --model model --data tokens --steps 2 --sequence-length 32 --batch-size 2 --out new",
        prepare=worlds.having("model", "tokens"),
        says="tokens: holds no chats, so nothing says which tokens are completions; tokenize records with messages, or use `koine train pretrain` for documents",
    ),
    Case(
        mistake="a training on a device that does not exist",
        command=PRETRAIN + " --device foo",
        prepare=worlds.having("tokens", "tokenizer"),
        says="unknown device 'foo'; give cpu, cuda or cuda:0",
    ),
    Case(
        mistake="a training on a device that is not there",
        command=PRETRAIN + " --device meta",
        prepare=worlds.having("tokens", "tokenizer"),
        says="no device 'meta' here; there is: cpu…",
    ),
    Case(
        mistake="an evaluation on a device that is not there",
        command=EVALUATE + " --device xpu:7",
        prepare=worlds.having("model", "text"),
        says="no device 'xpu:7' here; there is: cpu…",
    ),
    Case(
        mistake="how often to evaluate, and on nothing",
        command=PRETRAIN + " --evaluate-every 2",
        prepare=worlds.having("tokens", "tokenizer"),
        says="--evaluate-every without --evaluate-data; give documents to evaluate on",
    ),
    Case(
        mistake="the best of evaluations that are not made",
        command=PRETRAIN + " --best-metric loss",
        prepare=worlds.having("tokens", "tokenizer"),
        says="--best-metric without --evaluate-data; give documents to evaluate on",
    ),
    Case(
        mistake="documents to evaluate on, and never",
        command=PRETRAIN + " --evaluate-data text.jsonl",
        prepare=worlds.having("text", "tokens", "tokenizer"),
        says="--evaluate-data without --evaluate-every; say after how many steps to evaluate",
    ),
    Case(
        mistake="a metric that the evaluation does not have",
        command=PRETRAIN
        + " --evaluate-data text.jsonl --evaluate-every 2 --best-metric bits_per_byte_language",
        prepare=worlds.having("text", "tokens", "tokenizer"),
        says="the evaluation has no metric 'bits_per_byte_language'; did you mean 'bits_per_byte_languages' or 'bits_per_byte_domains' or 'bits_per_byte'?",
    ),
    Case(
        mistake="a checkpoint where a model is needed",
        command=CHAT.replace("chat model", "chat halfway/checkpoints/step-000001"),
        prepare=worlds.having("halfway"),
        says="halfway/checkpoints/step-000001: is a checkpoint of a training; make a model of it: koine model export halfway/checkpoints/step-000001 --format safetensors --out MODEL",
    ),
    Case(
        mistake="a model where a checkpoint is needed",
        command="model export model --format safetensors --out new",
        prepare=worlds.having("model"),
        says="model: is no checkpoint of a training; give OUT/checkpoints/step-N of a training",
    ),
    Case(
        mistake="a damaged checkpoint to make a model of",
        command="model export halfway/checkpoints/step-000001 --format safetensors --out new",
        prepare=worlds.having("halfway", then=worlds.spoil_checkpoint),
        says="halfway/checkpoints/step-000001/__0_0.distcp: damaged checkpoint (its sha256 differs); choose an earlier checkpoint",
    ),
    Case(
        mistake="going on with other settings",
        command=RESUME.replace("--batch-size 2", "--batch-size 4"),
        prepare=worlds.having("tokens", "tokenizer", "halfway"),
        says="halfway/checkpoints/step-000001: this folder holds a training with other settings: mixture.batch_size: 2 -> 4; run the same command again to resume, or choose another --out",
    ),
    Case(
        mistake="a damaged checkpoint",
        command=RESUME,
        prepare=worlds.having("tokens", "tokenizer", "halfway", then=worlds.spoil_checkpoint),
        says="halfway/checkpoints/step-000001/__0_0.distcp: damaged checkpoint (its sha256 differs); remove step-000001 to start from the beginning (there is none before it)",
    ),
    Case(
        mistake="two trainings in one folder",
        command=RESUME,
        prepare=worlds.having("tokens", "tokenizer", "halfway"),
        during=worlds.locked("halfway/.lock"),
        says="halfway/.lock: another process is training in this folder; wait for it to end, or choose another folder",
    ),
    Case(
        mistake="a disk that is full while training",
        command=PRETRAIN,
        prepare=worlds.having("tokens", "tokenizer"),
        during=worlds.full_disk,
        simulated="fsync reports that no space is left",
        leaves="new/",
        says="new: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="a model to describe that is no preset and no folder",
        command="model describe koine-8",
        says="unknown preset 'koine-8'; did you mean 'koine-8m' or 'koine-8b' or 'koine-4m'?",
    ),
    Case(
        mistake="a model for llama.cpp that llama.cpp would run differently",
        command="model export model --format gguf --out model.gguf",
        prepare=worlds.having(
            "model", then=worlds.edited_json("model/config.json", tie_word_embeddings=False)
        ),
        says="model/config.json: llama.cpp has no architecture for this model: its output matrix is not the embedding; it reads tied models of this kind only",
    ),
    Case(
        mistake="a model for llama.cpp without its tokenizer",
        command="model export model --format gguf --out model.gguf",
        prepare=worlds.having("model", then=worlds.removed("model/tokenizer.json")),
        says="model: holds no tokenizer.json; give a folder written by `koine tokenizer train` or a model's",
    ),
    Case(
        mistake="an export over a file that is there",
        command="model export model --format gguf --out model/config.json",
        prepare=worlds.having("exportable", then=worlds.renamed("exportable", "model")),
        says="model/config.json: exists already; add --overwrite, or choose another --out",
    ),
    Case(
        mistake="a disk that is full while exporting",
        command="model export model --format gguf --out model.gguf",
        prepare=worlds.having("exportable", then=worlds.renamed("exportable", "model")),
        during=worlds.full_disk,
        simulated="fsync reports that no space is left",
        says="model.gguf: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="a model folder that is not there",
        command=CHAT,
        says="model: no such folder; give the folder of a model",
    ),
    Case(
        mistake="a folder that is no model",
        command=CHAT,
        prepare=worlds.having("tokenizer", then=worlds.renamed("tokenizer", "model")),
        says="model: holds no config.json; give the folder of a model",
    ),
    Case(
        mistake="weights cut short",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.cut("model/model.safetensors")),
        says="model/model.safetensors: not a whole safetensors file (…); it is truncated or damaged; copy or build it again",
    ),
    Case(
        mistake="weights that are gone",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.removed("model/model.safetensors")),
        says="model: holds no model.safetensors; weights in another format must be converted first",
    ),
    Case(
        mistake="a configuration that is not JSON",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.cut("model/config.json")),
        says="model/config.json: not valid JSON (…); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a configuration of another size than the weights",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.edited_json("model/config.json", intermediate_size=24)),
        says="model: model.layers.0.mlp.gate_proj.weight has shape [192, 64], config.json says [24, 64]; config.json and the weights do not belong together",
    ),
    Case(
        mistake="a configuration without a field",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.edited_json("model/config.json", hidden_size=None)),
        says="model/config.json: the field 'hidden_size' is missing; the file is not a whole config.json",
    ),
    Case(
        mistake="a type of model that nobody knows",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.edited_json("model/config.json", model_type="lama")),
        says="model/config.json: the model_type 'lama' is unknown to transformers …; check its spelling, or upgrade transformers",
    ),
    Case(
        mistake="a tokenizer with more ids than the model",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.add_tokens("model/tokenizer.json")),
        says="model: the tokenizer has 302 ids and the model 294; these are not a pair; put the tokenizer that the model was trained with into its folder",
    ),
    Case(
        mistake="another architecture without the extra hf",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.edited_json("model/config.json", model_type="gpt_neox")),
        during=worlds.without_package("transformers"),
        simulated="the package is hidden",
        says="to open this model, the package 'transformers' is needed and not installed; … -m pip install 'koine-lm[hf]'",
    ),
    Case(
        mistake="an interrupted installation of the extra hf",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.edited_json("model/config.json", model_type="gpt_neox")),
        during=worlds.half_installed("transformers"),
        simulated="its metadata are there, its import fails",
        says="to open this model, the package 'transformers' is needed; it is installed but its import fails (ModuleNotFoundError: No module named 'transformers'), as after an interrupted installation; … -m pip install --force-reinstall --no-deps transformers",
    ),
    Case(
        mistake="nothing to evaluate on",
        command="evaluate model",
        prepare=worlds.having("model"),
        says="nothing to evaluate on; give --data PATH, --questions PATH, or both",
    ),
    Case(
        mistake="training questions without questions",
        command="evaluate model --data a.jsonl --training-questions b.jsonl",
        prepare=worlds.having("model"),
        says="training questions without questions; give --questions PATH too",
    ),
    Case(
        mistake="questions without answers",
        command="evaluate model --questions questions.jsonl",
        prepare=worlds.having(
            "model",
            then=lambda folder: worlds.write_lines(
                folder / "questions.jsonl",
                [{"messages": [{"role": "user", "content": "Why?"}], "language": "en", "id": "q1"}],
            ),
        ),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is questions.jsonl, line 1: the last message is not the assistant's; fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="results to a folder that is not there",
        command=EVALUATE + " --out results/today.json",
        prepare=worlds.having("model", "text"),
        says="results: no such folder; make it first, or choose another --out",
    ),
    Case(
        mistake="results over a folder that is there",
        command=EVALUATE + " --out results",
        prepare=worlds.having("model", "text", then=lambda folder: (folder / "results").mkdir()),
        says="results: a folder; give the file to write, such as results.json",
    ),
    Case(
        mistake="a negative seed in evaluation",
        command=EVALUATE + " --seed -1",
        prepare=worlds.having("model", "text"),
        says="Invalid value for '--seed': -1 is not in the range x>=0.",
    ),
    Case(
        mistake="an evaluation on a folder of several splits",
        command="evaluate model --data texts",
        prepare=worlds.having(
            "model",
            then=worlds.both(
                worlds.written("texts/train.jsonl", '{"text": "seen"}'),
                worlds.written("texts/test.jsonl", '{"text": "unseen"}'),
            ),
        ),
        says="texts: its files are of several splits (test, train); say which is meant, for example --split test, or all",
    ),
    Case(
        mistake="a batch size of zero in evaluation",
        command=EVALUATE + " --batch-size 0",
        prepare=worlds.having("model", "text"),
        says="the batch size is 0; it must be at least 1",
    ),
    Case(
        mistake="an accelerator that is not there",
        command=CHAT + " --device cuda:7",
        prepare=worlds.having("model"),
        says="no device 'cuda:7' here; there is: cpu",
    ),
    Case(
        mistake="a question longer than the model's context",
        command=CHAT,
        prepare=worlds.having(
            "model", then=worlds.edited_json("model/config.json", max_position_embeddings=4)
        ),
        says="the question is 11 tokens long and the model's context holds 4; ask a shorter one",
    ),
    Case(
        mistake="chatting with a base model, which has no chat template",
        command=CHAT,
        prepare=worlds.having("model", then=worlds.removed("model/chat_template.jinja")),
        says="model: no chat template: a base model continues text; use --complete, or add a chat_template.jinja to the folder",
    ),
    Case(
        mistake="a system prompt where nothing is asked",
        command="chat model --complete --system brief --once hello",
        prepare=worlds.having("model"),
        says="--system needs a chat; write it into the text that --complete continues",
    ),
    Case(
        mistake="a chat template that loops",
        command=CHAT,
        prepare=worlds.having(
            "model",
            then=worlds.written(
                "model/chat_template.jinja",
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            ),
        ),
        says="the chat template takes more than 10 seconds; give another template",
    ),
    Case(
        mistake="a step that the training did not have",
        command="data at-step trained 999",
        prepare=worlds.having("trained"),
        says="step 999 is outside the mixture; it has the steps 0 to 1",
    ),
    Case(
        mistake="asking a folder that was not trained what it saw",
        command="data at-step tokenizer 1",
        prepare=worlds.having("tokenizer"),
        says="tokenizer: holds no training.json; only a model that `koine train` or a plan built knows its data",
    ),
)
