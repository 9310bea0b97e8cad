export default { slices: [], levels: { you: [], it: [] }, now: 10 };
