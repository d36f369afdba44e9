// Private-use characters that stand around the number of a tool call inside an answer's Markdown source.
export const CALL_START = "\uE000";
export const CALL_END = "\uE001";
