"""The page's own words for states and kinds of jobs."""

from __future__ import annotations

STATES = {
    "COMPLETED": "已完成",
    "FAILED": "失败",
    "CANCELLED": "已取消",
    "SKIPPED": "已跳过",
    "RUNNING": "运行中",
    "PENDING": "等待中",
    "UNKNOWN": "未知",
    "TIMEOUT": "超时",
    "NODE_FAIL": "节点故障",
    "OUT_OF_MEMORY": "内存不足",
    "PREEMPTED": "被抢占",
    "REQUEUED": "重新排队",
}
KINDS = {
    "prepare": "准备",
    "train": "训练",
    "merge": "合并",
    "infer": "问答",
    "report": "报告",
    "serve": "服务",
}
# What the payloads call their phases (results/<kind>.json, "seconds").
PHASES = {
    "import": "导入",
    "model": "模型",
    "check": "检查",
    "convert": "转换",
    "tokenize": "分词",
    "link": "链接",
    "train": "训练",
    "start": "启动",
    "stream": "逐块合并",
    "export": "导出",
    "proof": "证明",
    "load": "加载",
    "copy": "复制",
    "load_base": "加载基座",
    "base": "基座回答",
    "adapter": "适配器回答",
    "load_tuned": "加载微调后",
    "tuned": "微调后回答",
}


def tone(state: str) -> str:
    """The colour's name for a state."""
    return {"COMPLETED": "good", "RUNNING": "busy", "PENDING": "idle", "SKIPPED": "idle", "CANCELLED": "warn"}.get(
        state, "warn" if state == "UNKNOWN" else "bad"
    )
