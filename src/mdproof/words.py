"""The words that the engine prints on a page, in the page's language."""

from mdproof.site import Site

_WORDS = {
    "zh": {
        "verified": "✓ 已验证",
        "stale": "○ 未验证",
        "excused": "— 未运行",
        "output": "输出",
        "copy": "复制可运行代码",
        "copy_hint": "补全了所需的导入与前文，存成文件即可单独运行；测试跑的就是这段文字",
        "bare": "仅复制本段",
        "bare_hint": "只复制上面显示的代码",
        "stale_hint": "代码或它的依赖在上次验证后有改动",
        "verified_hint": "页面上的代码按顺序执行过，输出由工具记录",
        "varies": "因机器而异：",
        "raises": "预期的异常",
        "doc": "文档字符串",
        "reference": "API 参考",
        "seconds": "{:.1f} 秒",
        "cpu": "CPU",
        "interpreter": "Triton 解释器",
        "compiled": "编译 {}",
        "device": "{} 实机",
        "kernels": "编译所得的内核",
        "kernel_kernel": "内核",
        "kernel_target": "目标",
        "kernel_registers": "寄存器",
        "kernel_spills": "溢出",
        "kernel_shared": "共享内存",
        "kernel_tensor_core": "张量核心指令",
        "no_tensor_core": "无",
    },
    "en": {
        "verified": "✓ verified",
        "stale": "○ not verified",
        "excused": "— not run",
        "output": "Output",
        "copy": "Copy runnable code",
        "copy_hint": "with the imports and earlier lines it needs; this very text is tested alone",
        "bare": "Copy this block",
        "bare_hint": "only the code shown above",
        "stale_hint": "the code or something it depends on changed since it was verified",
        "verified_hint": "the page's code was run in order; the tool recorded the output",
        "varies": "differs between machines: ",
        "raises": "expected exception",
        "doc": "Docstring",
        "reference": "API reference",
        "seconds": "{:.1f} s",
        "cpu": "CPU",
        "interpreter": "Triton interpreter",
        "compiled": "compiled {}",
        "device": "on {}",
        "kernels": "Compiled kernels",
        "kernel_kernel": "Kernel",
        "kernel_target": "Target",
        "kernel_registers": "Registers",
        "kernel_spills": "Spills",
        "kernel_shared": "Shared memory",
        "kernel_tensor_core": "Tensor-core instructions",
        "no_tensor_core": "none",
    },
}


def words(site: Site, page: str = "") -> dict[str, str]:
    """Return the words for a page; `room.en.md` is English whatever the site's language."""
    language = page.rsplit(".", 2)[-2] if page.count(".") >= 2 else site.language
    return _WORDS["zh" if language.startswith("zh") else "en"]
